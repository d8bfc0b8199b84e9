"""What a run is: settings, their checks, how they are read, and where a run keeps its files.

Imports no torch, so that a login node checks a run in a tenth of a second. Read `schema.py` first.
"""
