"""Types of the arguments of verbs, with the names that their help shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

# Without a hint of their own, tyro would print the default None.
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
NumNodes = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="", aliases=("--nodes",))]
NodeRank = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="", aliases=("--node",))]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
ConfigFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG.toml")]
