"""Compare settings with their defaults. Must not know what a setting means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at run time, because schema.py imports the modules that use this one
    from tinytrain_dist.config.schema import TrainingConfig


def changed_from_default(config: TrainingConfig, names: Iterable[str]) -> list[str]:
    """Return those of the named settings whose value is not the default, in the same order."""
    fields = type(config).__dataclass_fields__
    return [name for name in names if getattr(config, name) != fields[name].default]
