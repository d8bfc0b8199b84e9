"""Draw training windows from token files, and read them ahead.

Reading order: `sampling.py`, which defines the terms, then `token_file.py`, `token_dataset.py` and `batches.py`.
`token_bytes.py` serves evaluation. `preparation/` makes token files from text.
"""
