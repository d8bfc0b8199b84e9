"""Initialize a model from the weights in a Hugging Face folder; each rank reads its own rows.

The folder holds config.json and the weights as safetensors: one file, or several with an index. Our parameter names are
Hugging Face's, so nothing is converted.
"""

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
    """Set the weights of the model from a Hugging Face folder of safetensors.

    Errors: ConfigError if the folder's architecture or sizes are not those of the configuration; CheckpointError if the
    names or shapes of its tensors do not fit.
    """
    check_hf_config(config, folder)
    reader = TensorReader(folder, "model")
    wanted = model_tensors(model)
    problems = [f"{name}: is missing" for name in wanted if name not in reader.files]
    problems += [
        f"{name}: is not a weight of this model"
        for name in reader.files
        if name not in wanted and not _is_redundant(name, config)
    ]
    for name in wanted.keys() & reader.files.keys():
        shape, expected = reader.spec(name)[0], tuple(wanted[name].shape)
        if shape != expected:
            problems.append(f"{name}: is {list(shape)} in the folder, but {list(expected)} in this model")
    if problems:
        raise CheckpointError(
            f"init_from = {folder}: does not fit this model; give another folder, or change the model settings:\n  "
            + "\n  ".join(sorted(problems)[:10])
        )
    load_tensors(reader, wanted)


def _is_redundant(name: str, config: TrainingConfig) -> bool:
    """Return whether a tensor in the folder can be ignored: a tied output head, or precomputed rotary tables."""
    return (name == "lm_head.weight" and config.tie_embeddings) or "rotary" in name
