"""`tinytrain prepare`: turn text into a tokenizer and token files, and print a summary."""

from __future__ import annotations

import shlex
import time

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.data.preparation.options import PrepareOptions
from tinytrain_dist.data.preparation.planning import say
from tinytrain_dist.data.preparation.prepare import prepare_with
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals
from tinytrain_dist.utils.lost_output import keep_output_from_failing


def print_prepared(given: PrepareOptions) -> None:
    """Prepare text, and print a summary."""
    start = time.monotonic()
    meta = prepare_with(given)
    seconds = time.monotonic() - start
    megabytes = (meta["train_bytes"] + meta["val_bytes"]) / 1e6
    out = given.out
    print(f"{out}: {megabytes:,.1f} MB of text in {seconds:,.1f} s, {meta['vocab_size']:,} ids in the vocabulary")
    names = {}
    for side in ("train", "val"):
        shards = meta.get(f"{side}_shards")
        names[side] = f"{side}.npy" if shards is None else f"{side}-*.npy"
        files = "" if shards is None else f" in {shards:,} files"
        tokens, documents = meta[f"{side}_tokens"], meta[f"{side}_documents"]
        print(f"  {names[side]:11} {tokens:>14,} tokens, {documents:,} documents{files}")
    train, val = (shlex.quote(f"{out}/{name}") for name in names.values())
    mask = " --loss-mask true" if given.chat else ""
    print(f"next: tinytrain train CONFIG.toml --train-data {train} --val-data {val}{mask}")


def main(args: list[str]) -> int:
    """Run `tinytrain prepare`. The caller prints DataError and ConfigError."""
    keep_output_from_failing()  # the files are what counts
    try:
        with (
            exit_on_stop_signals()
        ):  # so that a batch system, or a terminal that is closed, leaves nothing half-written
            print_prepared(call_verb(PrepareOptions, "prepare", args))
    except KeyboardInterrupt as stop:
        say(f"stopped; {stop.args[0] if stop.args else 'nothing was written'}")
        return 130
    return 0
