"""Owns the `tinytrain` command: names the tools and prints what users did wrong. Must not hold any other logic."""

from __future__ import annotations

import sys
from importlib import import_module

from tinytrain_dist.errors import TinytrainError

TOOLS = {
    "prepare": ("tinytrain_dist.tools.prepare", "text -> tokenizer and token files"),
    "sample": ("tinytrain_dist.tools.sample", "text from a checkpoint"),
    "schedule": ("tinytrain_dist.tools.plot", "the learning-rate curve of a configuration"),
    "plot": ("tinytrain_dist.tools.plot", "loss curves of runs as a picture"),
}


def main(args: list[str] | None = None) -> int:
    """Run one tool; 0 when it worked, 2 for a user's mistake."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, TOOLS))
        print("usage: tinytrain TOOL [--help] ...\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in TOOLS.items()))
        return 0 if args else 2
    if args[0] not in TOOLS:
        print(f"error: no tool {args[0]!r}; there are {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    module = import_module(TOOLS[args[0]][0])
    entry = module.schedule_main if args[0] == "schedule" else module.main
    try:
        return int(entry(args[1:]))
    except TinytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
