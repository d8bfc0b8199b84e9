"""Helpers without a subject of their own: atomic_files writes small files, text formats numbers for people."""
