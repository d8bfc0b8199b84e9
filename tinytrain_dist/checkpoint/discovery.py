"""Find the newest valid checkpoint of a run, and read its saved state.

For commands and users who look at a run from outside. Must not import torch at the top: that takes seconds, and a
listing of runs does not need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.manifest import quick_problems, read_manifest
from tinytrain_dist.checkpoint.retention import RetentionRules, evaluation_key
from tinytrain_dist.config.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    TRAINER_STATE_FILE,
    RunFolder,
    is_checkpoint,
    open_run,
)
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.json_files import (
    describe_json_type,
    is_number,
    is_whole_number,
    nulls_to_nan,
    parse_nonfinite,
    read_json_dict,
)
from tinytrain_dist.utils.lost_output import print_line
from tinytrain_dist.utils.permissions import permission_problem

HF_CONFIG_FILE = "config.json"
DESCRIPTIONS = (TRAINER_STATE_FILE, HF_CONFIG_FILE, "tokenizer.json", "tokenizer_config.json")

DEFAULT_KEEP_LAST = TrainingConfig.keep_last
DEFAULT_PREFIX = FIELDS["ckpt_save_prefix"].default


def find_checkpoint(place: Path, kind: str | None = None) -> Path:
    """Return `place` itself if it is a checkpoint, else the newest valid checkpoint of the run at `place`.

    File sizes are checked. With `kind` ("model" or "optimizer"), every byte of the files of that kind is checked, too.
    Damaged checkpoints of a run are skipped and named on stderr.
    Errors: CheckpointError if `place` is a damaged checkpoint, or a run without a valid one.
    """
    if is_checkpoint(place):
        if problems := _problems(place, kind):
            raise CheckpointError("\n".join(problems))
        return place
    run = open_run(place)
    candidates = run.committed()
    for path in reversed(candidates):
        problems = _problems(path, kind)
        if not problems:
            return path
        print(f"skipped a damaged checkpoint: {'; '.join(problems)}", file=sys.stderr)
    raise CheckpointError(
        f"{run.checkpoints}: none of {len(candidates)} checkpoint(s) is valid; continue training, or give another run"
        if candidates
        else f"{run.checkpoints}: has no checkpoint yet; wait for the first (ckpt_every), or give another run"
    )


def find_model(place: Path) -> Path:
    """Return the checkpoint at `place`, as `find_checkpoint` does, or `place` itself if it is a Hugging Face folder.

    `tinytrain export` writes such folders; of those, every byte of the weights is checked.
    Errors: as of `find_checkpoint`.
    """
    if not is_huggingface_folder(place):
        return find_checkpoint(place, "model")
    if (place / MANIFEST_FILE).exists() and (problems := _problems(place, "model")):
        raise CheckpointError("\n".join(problems))
    return place


def is_huggingface_folder(path: Path) -> bool:
    """Return whether a folder is a model in Hugging Face's form, without the state of a run that a checkpoint has.

    A checkpoint that lost this state is damaged, as its manifest shows.
    """
    if not (path / HF_CONFIG_FILE).is_file() or (path / TRAINER_STATE_FILE).exists():
        return False
    return (path / MANIFEST_FILE).exists() or not is_checkpoint(path)


def _problems(path: Path, kind: str | None) -> list[str]:
    """Return what is wrong with the sizes, or, if nothing is, with the contents of the files of `kind`."""
    problems = quick_problems(path)
    if problems or kind is None:
        return problems
    # what is read besides the tensors of that kind: the state, config.json and the tokenizer
    files = read_manifest(path).files
    names = [name for name in files if name.startswith(kind) or name in DESCRIPTIONS]
    if not names:
        return []
    from tinytrain_dist.checkpoint.verify import find_damage  # imports torch

    return find_damage(path, names)


def own_checkpoints(run: RunFolder, settings: dict[str, Any], warn: Callable[[str], None]) -> CheckpointFolder:
    """Return the checkpoints of a run with its own prefix. `settings`: those in its config.toml. `warn`: see there."""
    return CheckpointFolder(run.checkpoints, str(settings.get("ckpt_save_prefix", DEFAULT_PREFIX)), warn)


def present_rules(run: RunFolder, settings: dict[str, Any]) -> RetentionRules:
    """Return what keeps the checkpoints of a run with its present settings. `settings`: those in its config.toml.

    Errors: CheckpointError if one of them is not valid.
    """
    keep_last = _count(run, settings, "keep_last", 1)
    keep_every = _count(run, settings, "keep_every", 0)
    own = own_checkpoints(run, settings, print_line).committed()
    newest = next((path for path in reversed(own) if not quick_problems(path)), None)
    state = read_json_object(newest / TRAINER_STATE_FILE) if newest else {}
    record = state.get("report")
    record = record if isinstance(record, dict) else {}
    sound_step = record.get("sound_step")
    sound_step = sound_step if is_whole_number(sound_step) else None
    step: Any = state.get("step")
    if sound_step is not None and is_whole_number(step) and sound_step >= step - 1:
        sound_step = None  # the loss was at its usual level when the newest was saved
    best_step, best_loss = record.get("best_eval_step"), record.get("best_eval_loss")
    return RetentionRules(
        keep_last or DEFAULT_KEEP_LAST,
        keep_every,
        best_step if is_whole_number(best_step) else None,
        best_loss if is_number(best_loss) else None,
        evaluation_key(settings),
        sound_step,
        run=str(settings.get("target_dir", "")),
    )


def _count(run: RunFolder, settings: dict[str, Any], name: str, least: int) -> int | None:
    """Return a setting that is a number, or None if it is not set: a user may have changed the file."""
    value = settings.get(name)
    if value is None or (is_whole_number(value) and value >= least):
        return value
    raise CheckpointError(
        f"{run.folder / CONFIG_FILE}: {name} is {value!r}, but must be a whole number, at least {least}; correct it, "
        f"or give another --{name.replace('_', '-')} to `tinytrain prune`"
    )


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint.

    In `report`, a loss that was not finite is NaN. Errors: CheckpointError if the file is missing or broken.
    """
    try:
        state = read_json_dict(checkpoint / TRAINER_STATE_FILE)
        if not is_whole_number(state.get("step")):
            raise ValueError("it has no step")
        for key in ("config", "data", "report", "bits", "optimizer"):
            if not isinstance(state.get(key, {}), dict):
                raise ValueError(f"{key} is {describe_json_type(state[key])} instead of an object")
        if "report" in state:
            state["report"] = nulls_to_nan(state["report"])
        if "optimizer" in state:
            state["optimizer"] = _read_optimizer_values(state["optimizer"])
        return state
    except (OSError, ValueError) as error:
        problem = f"{checkpoint}: {TRAINER_STATE_FILE} cannot be read ({error}); give a checkpoint of a training run"
        raise CheckpointError(permission_problem(error) or problem) from None


def _read_optimizer_values(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the plain values of an optimizer, checked for their form. Errors: ValueError."""
    groups = optimizer.get("param_groups", [])
    if not isinstance(optimizer.get("state", {}), dict) or not isinstance(groups, list):
        raise ValueError("optimizer has another form than this program writes")
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError("a group of the optimizer has no list of parameters")
    values: dict[str, Any] = parse_nonfinite(optimizer)
    return values
