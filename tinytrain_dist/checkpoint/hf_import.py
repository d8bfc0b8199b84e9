"""Start from the weights of a Hugging Face folder, each rank reading its own rows."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.checkpoint.sharded_io import load_tensors
from tinytrain_dist.checkpoint.state import model_tensors
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.model.hf_config import check_hf_config


def init_from_hf_folder(folder: Path, model: nn.Module, config: TrainingConfig) -> None:
    """Set the weights from a Hugging Face folder of safetensors, each rank its own rows.

    Errors: ConfigError for an architecture or sizes that are not the configuration's; CheckpointError for names or
    shapes that do not fit.
    """
    check_hf_config(config, folder)
    reader, wanted = TensorReader(folder, "model"), model_tensors(model)
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    surplus = [name for name in reader.files if name not in wanted and name not in ignored and "rotary" not in name]
    problems = [f"{name}: is missing" for name in wanted if name not in reader.files]
    problems += [f"{name}: is not a weight of this model" for name in surplus]
    for name in wanted.keys() & reader.files.keys():
        if reader.spec(name)[0] != tuple(wanted[name].shape):
            problems.append(f"{name}: is {list(reader.spec(name)[0])} there, {list(wanted[name].shape)} here")
    if problems:
        raise CheckpointError(f"init_from = {folder}: does not fit:\n  " + "\n  ".join(sorted(problems)[:10]))
    load_tensors(reader, wanted)
