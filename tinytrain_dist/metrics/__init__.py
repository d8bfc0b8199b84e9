"""Measure and report a run: run log, TensorBoard, step metrics, timers, device data, profiler traces, environment.

Read `step_metrics.py` and `run_log.py` first, then `phase_timer.py` and `step_timer.py`, which take the measurements.
"""
