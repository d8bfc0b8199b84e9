"""Small helpers that know nothing of training: atomic file writes and text formatting."""
