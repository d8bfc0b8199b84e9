"""Draw training windows from token files, and read them ahead.

Reading order: `sampling.py`, which defines the terms, then `token_file.py`, `token_dataset.py` and `batches.py`.
`token_bytes.py` serves evaluation, and `stored_tokenizer.py` checks the tokenizer beside token files. `preparation/`
makes token files from text.
"""
