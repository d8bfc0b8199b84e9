"""Turn text into a tokenizer and token files.

Reading order: `prepare`, which calls the others, and `options`. `sources` finds files (`dataset_folders`,
`remote_files`), and `recognition` tells how each is read (`content_type`). `corpus` yields their documents
(`compressed_files`, `text_documents`, `table_documents`, `selection`).
`planning` looks at all of them once (`sample`, `duplicates`) and trains or loads a tokenizer (`tokenizer`,
`special_tokens`).
`encoding` makes token IDs, `token_writer` writes them, and `output_folder` lets them appear.
"""
