"""`tinytrain prepare`: turn text into a tokenizer and token files, and print a summary."""

from __future__ import annotations

import functools
import shlex
import time
from typing import Any

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.data.preparation.prepare import prepare, say
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals
from tinytrain_dist.utils.lost_output import keep_output_from_failing


@functools.wraps(prepare)
def prepare_and_print(sources: tuple[str, ...], out: str, **settings: Any) -> None:  # noqa: D103 - that of `prepare`
    start = time.monotonic()
    meta = prepare(sources, out, **settings)
    seconds = time.monotonic() - start
    megabytes = (meta["train_bytes"] + meta["val_bytes"]) / 1e6
    print(f"{out}: {megabytes:,.1f} MB of text in {seconds:,.1f} s, {meta['vocab_size']:,} ids in the vocabulary")
    for name in ("train", "val"):
        print(f"  {name + '.npy':9} {meta[f'{name}_tokens']:>14,} tokens, {meta[f'{name}_documents']:,} documents")
    data = f"--train-data {shlex.quote(f'{out}/train.npy')} --val-data {shlex.quote(f'{out}/val.npy')}"
    print(f"next: tinytrain train CONFIG.toml {data}")


def main(args: list[str]) -> int:
    """Run `tinytrain prepare`. The caller prints DataError and ConfigError."""
    keep_output_from_failing()  # the files are what counts
    try:
        with (
            exit_on_stop_signals()
        ):  # so that a batch system, or a terminal that is closed, leaves nothing half-written
            call_verb(prepare_and_print, "prepare", args)
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        return 130
    return 0
