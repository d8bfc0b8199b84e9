"""Token files as a source of training windows: which windows a step draws, and reading them ahead.

Read `sampling.py` first, then `token_dataset.py` and `batches.py`. `preparation/` makes token files from text.
"""
