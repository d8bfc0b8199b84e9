"""Turn text into a tokenizer and token files: `prepare` calls `corpus`, `tokenizer`, `token_writer`."""
