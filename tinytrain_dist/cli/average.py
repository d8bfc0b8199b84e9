"""`tinytrain average`: write the mean of the weights of several checkpoints as a new checkpoint.

Must not know how checkpoints are made: it reads them tensor by tensor, so that it needs the memory of one tensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from tinytrain_dist.checkpoint.discovery import find_checkpoint, read_trainer_state
from tinytrain_dist.checkpoint.manifest import quick_problems, write_file, write_json_file
from tinytrain_dist.checkpoint.new_folder import check_absent, new_folder
from tinytrain_dist.checkpoint.safetensors_io import TensorSpec, write_index, write_tensors
from tinytrain_dist.checkpoint.saved_weights import SavedWeights
from tinytrain_dist.checkpoint.state_collection import MAX_FILE_BYTES
from tinytrain_dist.checkpoint.state_digests import state_digest, tensor_entries
from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.config.run_folder import MANIFEST_FILE, TRAINER_STATE_FILE, is_checkpoint, open_run
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.reliability.stop_requests import exit_on_stop_signals
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.lost_output import keep_output_from_failing
from tinytrain_dist.utils.progress import progress_bar

# of config.json: what the weights do not depend on
OTHER_THAN_MODEL = ("max_position_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")
MAX_SHOWN = 5  # tensors named in an error
NOT_COPIED = (".safetensors", ".safetensors.index.json", MANIFEST_FILE, TRAINER_STATE_FILE)


def average(
    places: tyro.conf.Positional[tuple[Path, ...]],
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    last: int | None = None,
    weights: tuple[float, ...] = (),
    ema: bool = False,
) -> int:
    """Write the mean of the weights of several checkpoints as a new checkpoint, for sample, evaluate and export.

    It holds no state of an optimizer, so no run resumes from it. To train on from it, set init_from to its path.

    Args:
        places: Checkpoints, or runs (the newest valid checkpoint of each; with --last, several of each).
        out: The folder to write. It must not exist yet, and appears only when it is complete.
        last: Number of newest valid checkpoints to take from each run. Default: 1.
        weights: Weight of each checkpoint in the mean, such as 1 2 2. Default: equal weights.
        ema: Average the moving averages of the weights (see ema_decay) instead of the weights.
    """
    check_absent(out)
    checkpoints = [path for place in places for path in _checkpoints(place, last)]
    shares = _shares(checkpoints, weights)
    sources = [SavedWeights(path, average=ema) for path in checkpoints]
    _check_same_model(sources)
    averaged = "the moving averages of the weights in" if ema else "the weights in"
    print(f"the mean of {averaged} {len(checkpoints)} checkpoints:")
    for path, share in zip(checkpoints, shares, strict=True):
        print(f"  {share:.4f}  {path}")
    _write(out, sources, shares, ema)
    print(f"wrote {out}; `tinytrain evaluate {out} --data ...` computes its loss")
    return 0


def _checkpoints(place: Path, last: int | None) -> list[Path]:
    """Return the checkpoint at `place`, or the newest valid ones of the run there, in order of steps."""
    if last is None or is_checkpoint(place):
        return [find_checkpoint(place)]
    if last < 1:
        raise UsageError(f"--last: {last} is not a number of checkpoints; give at least 1", "average")
    committed = open_run(place).committed()
    valid = []
    for path in committed:
        if problems := quick_problems(path):
            print(f"skipped a damaged checkpoint: {'; '.join(problems)}", file=sys.stderr)
        else:
            valid.append(path)
    if len(valid) < last:
        raise UsageError(
            f"--last: {last} checkpoints were asked for, but {place} has {len(valid)} valid one(s); "
            "give a smaller number, or keep more (keep_last, keep_every)",
            "average",
        )
    return valid[-last:]


def _shares(checkpoints: Sequence[Path], weights: Sequence[float]) -> list[float]:
    """Return the share of each checkpoint in the mean; they sum to 1. Errors: UsageError."""
    if len(checkpoints) < 2:
        raise UsageError(
            f"a mean needs at least two checkpoints, got {len(checkpoints)}; name more, or give --last with a run",
            "average",
        )
    if len(set(path.resolve() for path in checkpoints)) < len(checkpoints):
        raise UsageError("a checkpoint is named twice; name each once, and use --weights to weigh it", "average")
    if not weights:
        return [1 / len(checkpoints)] * len(checkpoints)
    if len(weights) != len(checkpoints):
        raise UsageError(
            f"--weights: {len(weights)} weight(s) for {len(checkpoints)} checkpoints; give one for each", "average"
        )
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise UsageError(
            f"--weights: {' '.join(map(str, weights))} must be at least 0 and not all 0, with a finite sum", "average"
        )
    return [weight / sum(weights) for weight in weights]


def _check_same_model(sources: Sequence[SavedWeights]) -> None:
    """Check that all checkpoints have the same tensors. Errors: CheckpointError that names those which differ."""
    first = sources[0]
    for other in sources[1:]:
        names = {**first.shapes, **other.shapes}
        differing = [name for name in names if first.shapes.get(name) != other.shapes.get(name)]
        if differing:
            shown = [f"{name}: {first.shapes.get(name)} and {other.shapes.get(name)}" for name in differing[:MAX_SHOWN]]
            more = [f"and {len(differing) - MAX_SHOWN} more"] if len(differing) > MAX_SHOWN else []
            raise CheckpointError(
                f"{first.checkpoint} and {other.checkpoint}: are checkpoints of different models; average those of "
                "one model:\n  " + "\n  ".join([*shown, *more])
            )
        if problems := _different_settings(first.checkpoint, other.checkpoint):
            raise CheckpointError(
                f"{first.checkpoint} and {other.checkpoint}: have tensors of the same shapes, but are of different "
                f"models by their config.json ({'; '.join(problems)}); average those of one model"
            )


def _different_settings(first: Path, second: Path) -> list[str]:
    """Return in what the models of two checkpoints differ whose tensors have the same names and shapes."""
    one, other = (read_json_object(path / "config.json") for path in (first, second))
    names = [name for name in one if name in other and one[name] != other[name] and name not in OTHER_THAN_MODEL]
    return [f"{name} {one[name]} and {other[name]}" for name in names]


def mean_of(sources: Sequence[SavedWeights], shares: Sequence[float], name: str) -> Tensor:
    """Return the mean of one tensor: summed in float64 in the order of the checkpoints, then rounded to float32."""
    total = torch.zeros((), dtype=torch.float64)
    for source, share in zip(sources, shares, strict=True):
        total = total + source.read(name).double() * share
    return total.float()


def _write(out: Path, sources: Sequence[SavedWeights], shares: Sequence[float], ema: bool) -> None:
    newest = sources[-1].checkpoint
    specs = [TensorSpec(name, shape, torch.float32) for name, shape in sources[-1].shapes.items()]
    with new_folder(out) as (aside, manifest):
        with progress_bar("averaging tensors", len(specs)) as advance:

            def fetch(spec: TensorSpec) -> Tensor:
                value = mean_of(sources, shares, spec.name)
                advance(1)
                return value

            write_tensors(aside, "model", specs, map(fetch, specs), MAX_FILE_BYTES, manifest)
        write_index(aside, "model", specs, MAX_FILE_BYTES, manifest)
        for name in sources[-1].manifest.files:  # config.json and the tokenizer
            if not name.endswith(NOT_COPIED):
                write_file(aside, name, (newest / name).read_bytes(), manifest)
        write_json_file(aside, TRAINER_STATE_FILE, _state(sources, shares, ema), manifest)


def _state(sources: Sequence[SavedWeights], shares: Sequence[float], ema: bool) -> dict[str, Any]:
    """Return the content of trainer_state.json: that of the last checkpoint, and what the mean was made of.

    `weights`: the digest that `tinytrain hash` prints.
    """

    def weights_digest(checkpoint: Path) -> str:
        return state_digest(tensor_entries(checkpoint)["model"])

    state = read_trainer_state(sources[-1].checkpoint)
    kept = {key: state[key] for key in ("step", "tokens", "config", "data") if key in state}
    averaged = [
        {"checkpoint": str(source.checkpoint.resolve()), "share": share, "weights": weights_digest(source.checkpoint)}
        for source, share in zip(sources, shares, strict=True)
    ]
    return kept | {"averaged": averaged, "ema": ema}


def main(args: list[str]) -> int:
    """Run `tinytrain average`."""
    keep_output_from_failing()  # the folder is what counts
    with exit_on_stop_signals():
        return call_verb(average, "average", args)
