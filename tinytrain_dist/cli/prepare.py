"""`tinytrain prepare`: turn text into a tokenizer and token files, and say what came out."""

from __future__ import annotations

import functools
import shlex
import time
from typing import Any

import tyro

from tinytrain_dist.data.preparation.prepare import prepare, say
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals


@functools.wraps(prepare)
def _prepare_and_say(sources: tuple[str, ...], out: str, **settings: Any) -> None:
    start = time.monotonic()
    meta = prepare(sources, out, **settings)
    seconds, size = time.monotonic() - start, (meta["train_bytes"] + meta["val_bytes"]) / 1e6
    print(f"{out}: {size:,.1f} MB of text in {seconds:,.1f} s, {meta['vocab_size']:,} ids in the vocabulary")
    for name in ("train", "val"):
        print(f"  {name + '.npy':9} {meta[f'{name}_tokens']:>14,} tokens, {meta[f'{name}_documents']:,} documents")
    data = f"--train-data {shlex.quote(f'{out}/train.npy')} --val-data {shlex.quote(f'{out}/val.npy')}"
    print(f"next: launch/local.sh configs/quickstart.toml {data}")


def main(args: list[str]) -> int:
    """Run the verb and say what came out; DataError and ConfigError are the caller's to print."""
    try:
        with exit_on_stop_signals():  # a batch system, or a terminal that is closed
            tyro.cli(_prepare_and_say, prog="tinytrain prepare", args=args)
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        return 130
    return 0
