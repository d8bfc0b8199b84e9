"""Owns the way from a command line to an exit code: parse, join the world, train, and report what went wrong.

Must not know how training works. The first failing rank's sentence is the last thing it prints, and error.json has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from tinytrain_dist.commandline import parse_command_line
from tinytrain_dist.errors import MeetingError, TinytrainError
from tinytrain_dist.stopping import owns, write_state


def main(args: list[str]) -> int:
    """Run `[CONFIG.toml] --settings`; 0 when done or stopped as asked, 2 for a user's mistake, else 1."""
    folder, trainer = None, None
    try:
        config = parse_command_line(args)
        folder = Path(config.target_dir)
        from tinytrain_dist import distributed  # torch takes seconds; a wrong setting need not wait for it
        from tinytrain_dist.trainer import Trainer

        context = distributed.start(config.device)
        trainer = Trainer(config, context)
        trainer.fit()
    except BaseException as error:
        if isinstance(error, SystemExit):  # --help
            raise
        _fail(folder, error, trainer.step if trainer else None)
    distributed.close()
    return 0


def _fail(folder: Path | None, error: BaseException, step: int | None) -> None:
    """Tell what happened and end at once: leaving the process group in order would wait for ranks that hang."""
    from tinytrain_dist import distributed

    expected = isinstance(error, TinytrainError)  # raised together on all ranks, so one of them says it
    rank, host = distributed.who()
    where = f"rank {rank} on {host}" + (f", after step {step}" if step is not None else "")
    message = str(error) if expected else f"{where}: {type(error).__name__}: {error}"
    trace = "" if expected else traceback.format_exc()
    record = {"rank": rank, "host": host, "step": step, "message": message, "traceback": trace, "time": time.time()}
    if (not expected or rank == 0) and folder is not None and owns(folder):  # never into another process's run
        with contextlib.suppress(OSError):  # a full disk must not keep the sentence from being said
            write_state(folder, "failed", step)
            with open(folder / "error.json", "x", encoding="utf-8") as file:  # the first cause stays
                json.dump(record, file, indent=1)
    mine = rank == 0 or not expected or isinstance(error, MeetingError)
    if not distributed.tell_launcher(message) and mine:
        trace += f"error: {message}\n"
    print(trace, end="", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if expected else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
