"""`tinytrain compare`: find where two runs or checkpoints differ.

Must not know how a run is trained or what the numbers mean: it reads records, manifests and tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.discovery import find_checkpoint
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.checkpoint.state_digests import TITLE_OF_KIND, state_digest, tensor_entries
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import (
    CONFIG_FILE,
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
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.text import format_list

SERIES = {"loss": ("train", "loss"), "gradient norm": ("train", "grad_norm"), "eval loss": ("eval", "loss")}
MAX_SHOWN_TENSORS = 5  # differing tensors that are described
MAX_SHOWN_RANKS = 4  # of environment.json
Entry = list[Any]  # shape, type ("value" for a plain number), digest


def compare(a: PathArgument, b: PathArgument) -> int:
    """Find where two runs differ: the first logged step at which a loss or gradient norm differs in any bit.

    Also compares config.toml, environment.json, and the newest checkpoints of the same step. If either argument is a
    checkpoint, compares only tensors. Exit code 0 if records and tensors are the same, 1 if they differ.

    Args:
        a: A run (its target_dir) or a checkpoint.
        b: The run or checkpoint to compare it with.
    """
    if is_checkpoint(a) or is_checkpoint(b):
        return 1 if _compare_tensors(find_checkpoint(a), find_checkpoint(b)) else 0
    run_a = open_run(a)
    run_b = open_run(b)
    differ = _compare_records(run_a, run_b)
    checkpoints_a = {checkpoint_step(path): path for path in run_a.committed()}
    checkpoints_b = {checkpoint_step(path): path for path in run_b.committed()}
    common_steps = checkpoints_a.keys() & checkpoints_b.keys()
    if common_steps:
        step = max(common_steps)
        print(f"checkpoints at step {step}")
        differ |= _compare_tensors(checkpoints_a[step], checkpoints_b[step])
    _print_differences(CONFIG_FILE, read_settings(run_a.folder), read_settings(run_b.folder))
    _print_differences(ENVIRONMENT_FILE, _read_environment(run_a.folder), _read_environment(run_b.folder))
    print("different" if differ else "the same")
    return 1 if differ else 0


# ---------------------------------------------------------------- records


def _compare_records(run_a: RunFolder, run_b: RunFolder) -> bool:
    """Print the first step at which each series differs; return whether any does."""
    records_a = read_records(run_a.records)
    records_b = read_records(run_b.records)
    differ = False
    num_compared = 0
    for title, (kind, key) in SERIES.items():
        values_a = _series(records_a, kind, key)
        values_b = _series(records_b, kind, key)
        common_steps = sorted(values_a.keys() & values_b.keys())
        if common_steps:
            num_compared += len(common_steps)
            differ |= _compare_series(title, common_steps, values_a, values_b)
    if not num_compared:
        spans = f"{_span(records_a)} and {_span(records_b)}"
        raise TinytrainError(
            f"{run_a.records} and {run_b.records}: no step was logged in both ({spans}); train them over common steps, "
            "with the same log_every"
        )
    end_a = max(record["step"] for record in records_a)
    end_b = max(record["step"] for record in records_b)
    if end_a != end_b:
        print(f"{'':<14} the first ends at step {end_a}, the second at step {end_b}")
    return differ


def _series(records: list[Record], kind: str, key: str) -> dict[int, float]:
    """Return the values of a key by step."""
    return {record["step"]: float(record[key]) for record in records if record["kind"] == kind and key in record}


def _compare_series(
    title: str, common_steps: list[int], values_a: dict[int, float], values_b: dict[int, float]
) -> bool:
    """Print the first step at which two series differ in any bit; return whether they do."""
    first_step, last_step = common_steps[0], common_steps[-1]
    # repr differs if any bit of a float differs, and is the same for all NaNs
    differing = [step for step in common_steps if repr(values_a[step]) != repr(values_b[step])]
    if not differing:
        print(f"{title:<14} identical in every bit at {len(common_steps)} steps, {first_step} to {last_step}")
        return False
    step = differing[0]
    a, b = values_a[step], values_b[step]
    last_difference = abs(values_a[last_step] - values_b[last_step])
    print(
        f"{title:<14} first differs at step {step}: {a!r} and {b!r}, by {abs(a - b):.3g}; "
        f"at the last common step, {last_step}, by {last_difference:.3g}"
    )
    return True


def _span(records: list[Record]) -> str:
    steps = [record["step"] for record in records]
    return f"steps {min(steps)} to {max(steps)}" if steps else "nothing logged"


# ---------------------------------------------------------------- tensors


def _compare_tensors(checkpoint_a: Path, checkpoint_b: Path) -> bool:
    """Print which tensors of two checkpoints differ, with the largest difference; return whether any do."""
    entries_a = tensor_entries(checkpoint_a)
    entries_b = tensor_entries(checkpoint_b)
    differ = False
    for kind, title in TITLE_OF_KIND.items():
        if kind not in entries_a and kind not in entries_b:
            continue
        tensors_a = entries_a.get(kind, {})
        tensors_b = entries_b.get(kind, {})
        names = list(tensors_a | tensors_b)
        differing = [name for name in names if tensors_a.get(name) != tensors_b.get(name)]
        if not differing:
            print(f"{title:<14} identical in every bit, {len(names)} tensors, {state_digest(tensors_a)[:16]}")
            continue
        differ = True
        print(f"{title:<14} {len(differing)} of {len(names)} tensors differ")
        for name in differing[:MAX_SHOWN_TENSORS]:
            entry_a = tensors_a.get(name)
            entry_b = tensors_b.get(name)
            print(f"  {name}: {_describe_difference(checkpoint_a, checkpoint_b, kind, name, entry_a, entry_b)}")
        if len(differing) > MAX_SHOWN_TENSORS:
            print(f"  and {len(differing) - MAX_SHOWN_TENSORS} more")
    return differ


def _describe_difference(
    checkpoint_a: Path, checkpoint_b: Path, kind: str, name: str, entry_a: Entry | None, entry_b: Entry | None
) -> str:
    if entry_a is None or entry_b is None:
        return f"only in {checkpoint_b if entry_a is None else checkpoint_a}"
    shape_a, type_a, _ = entry_a
    shape_b, type_b, _ = entry_b
    if (shape_a, type_a) != (shape_b, type_b) or type_a == "value":
        return f"{_describe_entry(entry_a)} and {_describe_entry(entry_b)}"
    tensor_a = TensorReader(checkpoint_a, kind).read(name).double()
    tensor_b = TensorReader(checkpoint_b, kind).read(name).double()
    largest_difference = (tensor_a - tensor_b).abs().max().item()
    return f"largest difference {largest_difference:.3g}, largest value {tensor_a.abs().max().item():.3g}"


def _describe_entry(entry: Entry) -> str:
    shape, type_name, content = entry
    return str(content) if type_name == "value" else f"{type_name} {shape}"


# ---------------------------------------------------------------- settings and machines


def _read_environment(folder: Path) -> dict[str, Any]:
    """Return environment.json with nested names joined by dots and one text for all ranks; {} if it is missing."""
    environment = read_json_object(folder / ENVIRONMENT_FILE)
    if not environment:
        return {}
    named = environment.pop("ranks", [])
    ranks = [rank for rank in named if isinstance(rank, dict)] if isinstance(named, list) else []
    devices = [f"{rank.get('device')} of {rank.get('host')}" for rank in ranks]
    return {"ranks": f"{len(ranks)}: {format_list(devices, MAX_SHOWN_RANKS)}", **dict(_flatten(environment))}


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _print_differences(name: str, values_a: dict[str, Any], values_b: dict[str, Any]) -> None:
    """Print the keys whose values differ in two dictionaries, except target_dir, which always differs."""
    keys = [key for key in values_a | values_b if values_a.get(key) != values_b.get(key) and key != "target_dir"]
    result = f"{len(keys)} differ" if keys else "the same"
    one_is_missing = not values_a or not values_b
    print(f"{name:<14} {result}" + (", one is missing" if one_is_missing else ""))
    if not one_is_missing:
        for key in keys:
            print(f"  {key}: {values_a.get(key, 'not set')} and {values_b.get(key, 'not set')}")


def main(args: list[str]) -> int:
    """Run `tinytrain compare`."""
    return call_verb(compare, "compare", args)
