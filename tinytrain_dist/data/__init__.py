"""Token files as a source of training windows: which windows a step draws, and reading them ahead.

Read `sampling.py` first, which defines the words, then `token_file.py`, `token_dataset.py` and `batches.py`.
`token_bytes.py` serves evaluation. `preparation/` makes token files from text.
"""
