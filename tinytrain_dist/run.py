"""Owns the way from a command line to an exit code: parse, join the world, train, and report what went wrong.

Must not know how training works. The first failing rank's sentence is the last thing it prints, and error.json has it.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from tinytrain_dist.config import TrainingConfig, parse_command_line
from tinytrain_dist.errors import TinytrainError


def main(args: list[str]) -> int:
    """Run `[CONFIG.toml] --settings`; 0 when done or stopped as asked, 2 for a user's mistake, else 1."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_command_line(args)
    except TinytrainError as error:
        if first:  # every rank has read the same and says the same
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    from tinytrain_dist import distributed  # torch takes seconds; a wrong setting should not wait for it
    from tinytrain_dist.trainer import Trainer

    trainer = None
    try:
        context = distributed.start(config.device)
        trainer = Trainer(config, context)
        trainer.fit()
    except BaseException as error:
        return _fail(config, error, trainer.step if trainer else None)
    distributed.close()
    return 0


def _fail(config: TrainingConfig, error: BaseException, step: int | None) -> int:
    """Tell what happened and end at once: leaving the process group in order would wait for ranks that hang."""
    import json
    import socket

    rank, host = int(os.environ.get("RANK", "0")), socket.gethostname()
    expected = isinstance(error, TinytrainError)
    record = {
        "rank": rank, "host": host, "step": step, "type": type(error).__name__, "message": str(error),
        "time": time.time(), "traceback": "" if expected else traceback.format_exc(),
    }  # fmt: skip
    folder = Path(config.target_dir)
    path = folder / "error.json"
    if folder.is_dir() and (rank == 0 or not expected):
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if expected and rank == 0:  # raised on every rank alike
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not expected:
        print(record["traceback"], file=sys.stderr)
        print(
            f"error: rank {rank} on {host}, step {step}: {type(error).__name__}: {error}", file=sys.stderr, flush=True
        )
    sys.stdout.flush()
    os._exit(2 if expected else 1)
