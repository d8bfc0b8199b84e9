"""Compute what `tinytrain data` shows of token files: pure functions of the tokens, without output.

Reading order: `blocks.py`, then `corpus.py`, which uses `lengths.py`, `overlap.py` and `../document_hashes.py`.
`windows.py` and `token_texts.py` serve to show windows as text.
"""
