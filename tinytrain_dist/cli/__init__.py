"""Implement the `tinytrain` command: `main.py` finds the verb, and the file of that name has a `main(args) -> int`.

Several verbs share `tables.py` and `figure_style.py`. `doctor_checks/` has the checks of `doctor`.
"""
