"""Run the `tinytrain` command: find the verb, run it, and print errors without a traceback."""

from __future__ import annotations

import difflib
import io
import os
import sys
from importlib import import_module

from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.utils.lost_output import keep_output_from_failing

VERBS = {
    "prepare": ("tinytrain_dist.cli.prepare:main", "turn text into a tokenizer and token files"),
    "schedule": ("tinytrain_dist.cli.schedule:main", "show the learning rate of a configuration"),
    "plan": (
        "tinytrain_dist.cli.plan:main",
        "show whether a run fits in memory, what it needs, and how fast it can be",
    ),
    "doctor": ("tinytrain_dist.cli.doctor:main", "find problems on this machine, or on all nodes together"),
    "status": ("tinytrain_dist.cli.status:main", "show what a run is doing, or why it stopped"),
    "ls": ("tinytrain_dist.cli.ls:main", "list the checkpoints of a run, or the runs in a folder"),
    "prune": ("tinytrain_dist.cli.prune:main", "remove checkpoints that only earlier settings of a run keep"),
    "plot": ("tinytrain_dist.cli.plot:main", "draw the loss curves of runs"),
    "sample": ("tinytrain_dist.cli.sample:main", "generate text with a trained model"),
    "export": ("tinytrain_dist.cli.export:main", "write weights as a Hugging Face folder"),
    "verify": ("tinytrain_dist.cli.verify:main", "read every byte of checkpoints and report damage"),
    "hash": ("tinytrain_dist.cli.hash:main", "print one digest of weights and one of optimizer state"),
    "replay": (
        "tinytrain_dist.cli.replay:main",
        "train the steps after a checkpoint again, and compare them with the records",
    ),
    "compare": ("tinytrain_dist.cli.compare:main", "find where two runs or checkpoints differ"),
}


def main(args: list[str] | None = None) -> int:
    """Run one verb; return its exit code, or 2 for a user's mistake."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: tinytrain VERB [--help] ...\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in VERBS.items()))
        return 0 if args else 2
    if args[0] not in VERBS:
        close = difflib.get_close_matches(args[0], VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
        print(f"error: unknown verb {args[0]!r}; {hint}", file=sys.stderr)
        return 2
    keep_output_from_failing("stderr")  # progress and warnings; what a verb is asked for goes to stdout
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters of a model's text
    module, _, entry = VERBS[args[0]][0].partition(":")
    try:
        return int(getattr(import_module(module), entry)(args[1:]))
    except TinytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as in `tinytrain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # no permission, a full disk, a missing file: the system's message names it
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
