"""Run the `tinytrain` command: `python -m tinytrain_dist` is the same as `tinytrain`."""

from __future__ import annotations

import sys

from tinytrain_dist.utils.interrupts import end_quietly_on_interrupt


def main(args: list[str] | None = None) -> int:
    """Run one verb; return its exit code. Ctrl-C ends it without a traceback at any time."""
    end_quietly_on_interrupt()
    from tinytrain_dist.cli.main import main as run_command  # not at the top: an import takes time

    try:
        return run_command(args)
    finally:
        end_quietly_on_interrupt()  # while the interpreter ends


if __name__ == "__main__":
    sys.exit(main())
