"""Tables and argument types that several verbs share."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

PathArgument = tyro.conf.Positional[Path]
PIPE_WIDTH = 200  # columns; a pipe has no width, and rich would wrap lines at 80 columns


class _PipeConsole(Console):
    """A console that raises BrokenPipeError when the reader of the output has ended, as print does.

    A plain console exits with code 1 then, as if the verb had found something wrong.
    """

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled; main.py gives the exit code for it."""
        raise


def new_console() -> Console:
    """Return a console as wide as the terminal, or wide enough for any line where the output is a pipe."""
    return _PipeConsole(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def new_table(*columns: str) -> Table:
    """Return an empty table. A column whose name ends with `<` is aligned left, all others right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_left = column.endswith("<")
        table.add_column(column.rstrip("<"), justify="left" if is_left else "right", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table on a console of `new_console`."""
    new_console().print(table)
