"""The `tinytrain` command: `main.py` finds the verb, and each verb has a file of its name with a `main(args) -> int`.

Files that are no verb serve several: `tables.py`, `figures.py`, and the report and the checks of the doctor.
"""
