"""Helpers for all packages: atomic_files writes and reads small files, text formats values for messages."""
