"""Parts of `tinytrain report`: read runs in bounded memory, draw curves as SVG, and fill the page.

Read `run_data.py` first, then `curves.py` and `charts.py`, then `page.py` and the files that it fills: page.html,
style.css and script.js.
"""
