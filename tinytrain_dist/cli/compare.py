"""`tinytrain compare`: find where two runs or checkpoints differ.

Must not know how a run is trained or what the numbers mean: it reads records, manifests and tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from tinytrain_dist.checkpoint.digests import TITLE_OF_KIND, state_digest, tensor_entries
from tinytrain_dist.checkpoint.discovery import find_checkpoint
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import (
    ENVIRONMENT_FILE,
    Record,
    RunFolder,
    checkpoint_step,
    is_checkpoint,
    open_run,
    read_records,
    read_settings,
)
from tinytrain_dist.errors import TinytrainError

SERIES = {"loss": ("train", "loss"), "gradient norm": ("train", "grad_norm"), "eval loss": ("eval", "loss")}
SHOWN = 5  # tensors by name, where many differ


def compare(a: PathArgument, b: PathArgument) -> int:
    """Say where two runs part: the first logged step at which loss or gradient norm differ in any bit.

    Also compared: the newest checkpoint of a step that both have, config.toml and environment.json. With a checkpoint
    on either side only tensors are compared. Exit code 0: the same; 1: different.

    Args:
        a: A run (its target_dir) or a checkpoint.
        b: Another one.
    """
    if is_checkpoint(a) or is_checkpoint(b):
        return 1 if _compare_tensors(find_checkpoint(a), find_checkpoint(b)) else 0
    runs = open_run(a), open_run(b)
    differ = _compare_records(*runs)
    common = {checkpoint_step(path): path for path in runs[0].committed()}
    pairs = [(common[checkpoint_step(path)], path) for path in runs[1].committed() if checkpoint_step(path) in common]
    if pairs:
        print(f"checkpoints at step {checkpoint_step(pairs[-1][0])}")
        differ |= _compare_tensors(*pairs[-1])
    for name, values in (("config.toml", read_settings), ("environment.json", _environment)):
        _print_differences(name, values(runs[0].folder), values(runs[1].folder))
    print("different" if differ else "the same")
    return 1 if differ else 0


def _compare_records(a: RunFolder, b: RunFolder) -> bool:
    records = read_records(a.records), read_records(b.records)
    differ, compared = False, 0
    for title, (kind, key) in SERIES.items():
        one, two = ({r["step"]: float(r[key]) for r in run if r["kind"] == kind and key in r} for run in records)
        common = sorted(one.keys() & two.keys())
        compared += len(common)
        if not common:
            continue
        parting = next((step for step in common if repr(one[step]) != repr(two[step])), None)
        if parting is None:
            print(f"{title:<14} the same to the bit at {len(common)} steps, {common[0]} to {common[-1]}")
            continue
        differ = True
        print(
            f"{title:<14} first differs at step {parting}: {one[parting]!r} and {two[parting]!r}, "
            f"by {abs(one[parting] - two[parting]):.3g}; at the last common step {common[-1]} by "
            f"{abs(one[common[-1]] - two[common[-1]]):.3g}"
        )
    if not compared:
        raise TinytrainError(
            f"{a.records} and {b.records}: no step was logged in both ({_span(records[0])} and {_span(records[1])}); "
            "train both with the same log_every"
        )
    ends = [max(record["step"] for record in run) for run in records]
    if ends[0] != ends[1]:
        print(f"{'':<14} the first ends at step {ends[0]}, the second at step {ends[1]}")
    return differ


def _span(records: list[Record]) -> str:
    steps = [record["step"] for record in records]
    return f"steps {min(steps)} to {max(steps)}" if steps else "nothing logged"


def _compare_tensors(a: Path, b: Path) -> bool:
    """Print which tensors of two checkpoints are not the same, with the largest difference; whether there are any."""
    entries, differ = (tensor_entries(a), tensor_entries(b)), False
    for kind in (kind for kind in TITLE_OF_KIND if kind in entries[0] or kind in entries[1]):
        one, two = (found.get(kind, {}) for found in entries)
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
        if not names:
            print(f"{TITLE_OF_KIND[kind]:<14} the same to the bit, {len(one)} tensors, {state_digest(one)[:16]}")
            continue
        differ = True
        print(f"{TITLE_OF_KIND[kind]:<14} {len(names)} of {len({**one, **two})} tensors differ")
        for name in names[:SHOWN]:
            print(f"  {name}: {_tensor_difference(a, b, kind, name, one.get(name), two.get(name))}")
        if len(names) > SHOWN:
            print(f"  and {len(names) - SHOWN} more")
    return differ


def _tensor_difference(a: Path, b: Path, kind: str, name: str, one: Any, two: Any) -> str:
    if one is None or two is None:
        return f"only in {b if one is None else a}"
    if one[:2] != two[:2] or one[1] == "value":
        return " and ".join(f"{entry[2]}" if entry[1] == "value" else f"{entry[1]} {entry[0]}" for entry in (one, two))
    x, y = (TensorReader(path, kind).read(name).double() for path in (a, b))
    return f"largest difference {(x - y).abs().max().item():.3g}, largest value {x.abs().max().item():.3g}"


def _environment(folder: Path) -> dict[str, Any]:
    """environment.json with nested names joined, and the ranks as one line."""
    try:
        found = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ranks = found.pop("ranks", [])
    places = [f"{rank.get('device')} of {rank.get('host')}" for rank in ranks]
    return {"ranks": f"{len(ranks)}: {', '.join(places[:4])}{', ...' if places[4:] else ''}", **dict(_flat(found))}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _print_differences(name: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key) and key != "target_dir"]
    print(
        f"{name:<14} " + ("the same" if not keys else f"{len(keys)} differ") + ("" if a and b else ", one is missing")
    )
    for key in keys if a and b else []:
        print(f"  {key}: {a.get(key, 'not set')} and {b.get(key, 'not set')}")


def main(args: list[str]) -> int:
    """`tinytrain compare`."""
    return tyro.cli(compare, prog="tinytrain compare", args=args)
