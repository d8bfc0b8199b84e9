"""Draw training windows from token files, and read them ahead.

Reading order: `window_sampling.py`, which defines the terms, then `token_file.py`, `token_dataset.py` and `batches.py`.
`bytes_per_token.py` serves evaluation, and `stored_tokenizer.py` checks the tokenizer beside token files.
`preparation/` makes token files from text, and `statistics/` describes what is in them.
"""
