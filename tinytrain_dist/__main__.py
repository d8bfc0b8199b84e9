"""Run the `tinytrain` command: `python -m tinytrain_dist` is the same as `tinytrain`."""

from __future__ import annotations

import sys

from tinytrain_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
