"""Load the model of a checkpoint into one process, ready to use.

Must not know runs: `discovery.find_checkpoint` finds the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tinytrain_dist.checkpoint.discovery import read_trainer_state
from tinytrain_dist.checkpoint.sharded_io import read_checkpoint
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.model.transformer import TransformerLM

MODEL_SETTINGS = {*(name for name, field in FIELDS.items() if field.metadata["section"] == "model"), "context_len"}


def load_model(checkpoint: Path, device: torch.device) -> TransformerLM:
    """Return the model of a checkpoint in float32, ready to use; needs no process group.

    The model is in evaluation mode and computes no gradients. Errors: CheckpointError if the checkpoint holds no
    configuration, or if its tensors do not fit the model of that configuration.
    """
    saved = read_trainer_state(checkpoint).get("config")
    if not saved:
        raise CheckpointError(
            f"{checkpoint}: holds no configuration (save_checkpoint writes none); give a checkpoint of a training run"
        )
    # Only the settings that the model needs: others may have been renamed since the checkpoint was saved.
    settings = {name: value for name, value in saved.items() if name in MODEL_SETTINGS}
    config = TrainingConfig.from_dict(settings, f"the configuration of {checkpoint}")
    with torch.device("meta"):
        model = TransformerLM(config)
    model.to_empty(device=device)
    model.tie_weights()
    read_checkpoint(checkpoint, model, None)
    return model.eval().requires_grad_(False)
