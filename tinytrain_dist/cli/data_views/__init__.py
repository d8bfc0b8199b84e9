"""Parts of `tinytrain data`: find the files that are meant, collect their numbers, and show them.

Read `place.py` first, then `findings.py`, then what shows them: `text.py`, `windows.py` and `page.py`.
"""
