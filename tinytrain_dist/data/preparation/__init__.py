"""Turn text into a tokenizer and token files: `corpus` -> `tokenizer` -> `token_writer`, driven by `prepare`."""
