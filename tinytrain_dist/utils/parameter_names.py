"""Recover the names of parameters from those that wrappers of a model give them."""

from __future__ import annotations

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def original_name(name: str) -> str:
    """Return a parameter's name without the prefixes that wrappers add to parts of it."""
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix).replace("." + prefix, ".")
    return name
