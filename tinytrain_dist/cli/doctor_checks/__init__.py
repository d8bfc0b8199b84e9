"""The checks of `tinytrain doctor`, one file for each group, and their report."""
