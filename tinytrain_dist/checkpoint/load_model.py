"""Load the model of a checkpoint or of a Hugging Face folder into one process, ready to use.

Must not know runs: `discovery.find_model` finds the folder.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tinytrain_dist.checkpoint.discovery import is_huggingface_folder, read_trainer_state
from tinytrain_dist.checkpoint.huggingface_import import check_hf_weights
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.checkpoint.saved_weights import SavedWeights
from tinytrain_dist.checkpoint.sharded_io import check_same_tensors, load_tensors, read_checkpoint
from tinytrain_dist.checkpoint.state_collection import model_tensors
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.model.huggingface_config import settings_of_hf_folder
from tinytrain_dist.model.transformer import TransformerLM

MODEL_SETTINGS = {*(name for name, field in FIELDS.items() if field.metadata["section"] == "model"), "context_len"}


def load_model(checkpoint: Path, device: torch.device, *, average: bool = False) -> TransformerLM:
    """Return the model of a checkpoint in float32, ready to use; needs no process group.

    The model is in evaluation mode and computes no gradients. average: with the moving average of its weights.
    Errors: CheckpointError if the checkpoint holds no configuration or no average, or if its tensors do not fit the
    model of that configuration. ConfigError if a Hugging Face folder has a model that is not supported.
    """
    if is_huggingface_folder(checkpoint):
        return _load_huggingface_model(checkpoint, device, average)
    return load_weights(SavedWeights(checkpoint, average=average), device)


def _load_huggingface_model(folder: Path, device: torch.device, average: bool) -> TransformerLM:
    """Return the model in a Hugging Face folder; see `load_model`."""
    if average:
        raise CheckpointError(
            f"ema: {folder} is a Hugging Face folder, which has one set of weights; leave --ema out (`tinytrain export "
            "--ema` writes the average)"
        )
    config = TrainingConfig.from_dict(settings_of_hf_folder(folder, "checkpoint"), f"{folder}/config.json")
    with torch.device("meta"):
        model = TransformerLM(config)
    check_hf_weights(folder, model, config)  # before memory is allocated
    model.to_empty(device=device)
    model.tie_weights()
    load_tensors(TensorReader(folder, "model"), model_tensors(model))
    return model.eval().requires_grad_(False)


def load_weights(weights: SavedWeights, device: torch.device) -> TransformerLM:
    """Return the model of these weights; see `load_model`."""
    checkpoint = weights.checkpoint
    saved = read_trainer_state(checkpoint).get("config")
    if not saved:
        raise CheckpointError(
            f"{checkpoint}: holds no configuration (save_checkpoint writes none); give a checkpoint of a training run"
        )
    # Only the settings that the model needs: others may have been renamed since the checkpoint was saved.
    settings = {name: value for name, value in saved.items() if name in MODEL_SETTINGS}
    config = TrainingConfig.from_dict(settings, f"the configuration of {checkpoint}")
    saved_tensors = weights.manifest.tensors.get("model", {})
    try:
        if config.num_layers > len(saved_tensors):
            raise ValueError(f"num_layers: {config.num_layers}, but only {len(saved_tensors)} tensors were saved")
        with torch.device("meta"):
            model = TransformerLM(config)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # torch's, for sizes that cannot be
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{checkpoint}: has no usable configuration ({reason}); use another one") from None
    # before memory is allocated: sizes that are not the saved ones may need any amount of it
    check_same_tensors(checkpoint, "model", saved_tensors, model_tensors(model))
    model.to_empty(device=device)
    model.tie_weights()
    read_checkpoint(checkpoint, model, None)
    tensors = model_tensors(model)
    with torch.no_grad():
        for name in weights.averaged:
            tensors[name].copy_(weights.read(name))
    return model.eval().requires_grad_(False)
