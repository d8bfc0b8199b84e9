"""Turn text into a tokenizer and token files.

Reading order: `sources` finds files, `corpus` reads their documents (`compressed_files`, `content_type`,
`text_documents`), `sample` looks at all of them once, `tokenizer` is trained or loaded, `encoding` makes token IDs, and
`token_writer` and `output_folder` write them. `prepare` calls these.
"""
