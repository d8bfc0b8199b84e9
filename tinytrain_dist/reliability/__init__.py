"""What keeps a run safe: checks before step 1, stop requests, the watchdog, heartbeats, error reports, the run lock.

Read `rank_consistency.py` and `storage_checks.py` (before step 1), then `stop_requests.py`, `watchdog.py` and
`error_report.py` (how a run ends), then `run_lock.py` and `run_state.py` (what a run leaves in its folder).
"""
