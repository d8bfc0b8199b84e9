"""The `tinytrain` command: `main.py` finds the verb, and each verb has a file of its name."""
