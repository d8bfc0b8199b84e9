"""Implement the `tinytrain` command: `main.py` finds the verb, and the file of that name has a `main(args) -> int`.

Several verbs share `tables.py` and `figure_style.py`. `doctor_report.py` and the `*_checks.py` files are of `doctor`.
"""
