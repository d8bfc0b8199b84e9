"""What a run reports: the run log, TensorBoard, step metrics, timers, device facts, traces, the environment.

Read `step_metrics.py` and `run_log.py` first. Then `phase_timer.py` and `timers.py`, which measure what they report.
"""
