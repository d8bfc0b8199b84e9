"""What keeps a run safe: stop requests, the run lock, error reports, the watchdog, and checks before step 1."""
