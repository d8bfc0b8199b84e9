"""Protect a run from failures: checks before step 1, stop requests, watchdog, heartbeats, error reports, run lock.

Read `rank_consistency.py` and `storage_checks.py` (before step 1), then `stop_requests.py`, `watchdog.py` and
`error_report.py` (how a run ends), then `run_lock.py` and `run_state.py` (files in the run folder).
"""
