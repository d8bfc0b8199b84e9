"""Run the `tinytrain` command: find the verb, run it, and print errors without a traceback.

Must not import a verb before it is asked for, so that `tinytrain --help` answers at once.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from dataclasses import dataclass
from importlib import import_module

from tinytrain_dist import __version__
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.utils.current_folder import current_folder_problem
from tinytrain_dist.utils.interrupts import EXIT_CODE, MESSAGE, raise_on_interrupt
from tinytrain_dist.utils.lost_output import keep_output_from_failing
from tinytrain_dist.utils.permissions import permission_problem


@dataclass(frozen=True)
class Verb:
    """A subcommand. Its module in this package has its name, a `main(args) -> int` and `arguments`."""

    name: str
    summary: str
    arguments: str  # name in the module: the function or dataclass whose parameters are the options

    def module_name(self) -> str:
        """Return the name of the module that implements the verb."""
        return f"tinytrain_dist.cli.{self.name}"


# By the moment at which a user needs them.
GROUPS = {
    "Prepare": (
        Verb("new", "make a folder for a run, with a commented configuration", "new"),
        Verb("prepare", "turn text into a tokenizer and token files", "PrepareOptions"),
        Verb("data", "show what is in token files: duplicates, overlap, windows as text", "DataOptions"),
        Verb("config", "show every setting of a configuration, and where its value comes from", "ConfigOptions"),
        Verb("schedule", "show the learning rate of a configuration, and what else changes", "ScheduleOptions"),
        Verb("plan", "show whether a run fits in memory, what it needs, and how fast it can be", "PlanOptions"),
        Verb("doctor", "find problems on this machine, or on all nodes together", "DoctorOptions"),
    ),
    "Train": (
        Verb("branch", "make a run that decays the learning rate from a checkpoint of another run", "BranchOptions"),
        Verb("train", "train on this machine, or as one of several nodes", "TrainOptions"),
        Verb("store", "serve the list of nodes of a run whose nodes may come and go", "store"),
        Verb("submit", "check a run, and submit it to Slurm", "SubmitOptions"),
    ),
    "Watch": (
        Verb("status", "show what a run is doing, or why it stopped", "status"),
        Verb("ls", "list the checkpoints of a run, or the runs in a folder", "ls"),
        Verb("plot", "draw the loss curves of runs", "plot"),
        Verb("report", "write one HTML file about runs, to share", "report"),
        Verb("compare", "find where two runs or checkpoints differ", "compare"),
        Verb("replay", "train the steps after a checkpoint again, and compare them with the records", "replay"),
    ),
    "Use": (
        Verb("sample", "generate text with a trained model", "Options"),
        Verb("evaluate", "compute loss, perplexity and bits per byte on a text or a token file", "evaluate"),
        Verb("average", "write the mean of the weights of several checkpoints", "average"),
        Verb("export", "write weights as a Hugging Face folder", "export"),
        Verb("verify", "read every byte of checkpoints and report damage", "verify"),
        Verb("hash", "print one digest of weights and one of optimizer state", "print_digests"),
        Verb("prune", "remove checkpoints that only earlier settings of a run keep", "prune"),
    ),
    "Other": (Verb("completion", "print a script that completes commands in your shell", "completion"),),
}
VERBS = {verb.name: verb for verbs in GROUPS.values() for verb in verbs}


def usage() -> str:
    """Return the help of the command: all verbs, by the moment at which a user needs them."""
    width = max(map(len, VERBS))
    lines = ["usage: tinytrain VERB [--help] ...", "       tinytrain --version"]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb.name:<{width}}  {verb.summary}" for verb in verbs)]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> int:
    """Run one verb; return its exit code, or 2 for a user's mistake."""
    args = sys.argv[1:] if args is None else args
    keep_output_from_failing("stderr")  # progress and warnings; what a verb is asked for goes to stdout
    if sys.stdout is None:  # it was closed, as by >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters of a model's text
    try:
        code = _run(args)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except TinytrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(MESSAGE, file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # the reader of the output has ended, as in `tinytrain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError as error:  # numpy's says how much; that of Python is empty
        print(f"error: not enough memory{f' ({error})' if str(error) else ''}; ask for less", file=sys.stderr)
        return 1
    except OSError as error:  # no permission, a full disk, a missing file: the system's message names it
        print(f"error: {permission_problem(error) or error}", file=sys.stderr)
        return 1


def _run(args: list[str]) -> int:
    """Run one verb. Errors: what the verb raises."""
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"tinytrain_dist {__version__}")
        return 0
    if args[0] not in VERBS:
        close = difflib.get_close_matches(args[0], VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
        print(f"error: unknown verb {args[0]!r}; {hint}", file=sys.stderr)
        return 2
    if problem := current_folder_problem():
        raise TinytrainError(problem)
    run_verb = import_module(VERBS[args[0]].module_name()).main
    raise_on_interrupt()
    return int(run_verb(args[1:]))


if __name__ == "__main__":
    sys.exit(main())
