"""Read the weights of a checkpoint one by one: those of its step, or their exponential moving average.

The average is part of the optimizer's state, under the name PARAMETER.ema (see optim/weight_average.py). Must not know
models or ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.manifest import Manifest, read_manifest
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.checkpoint.state_digests import tensor_digest
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.optim.weight_average import AVERAGE_KEY
from tinytrain_dist.utils.progress import Advance, no_progress

FLOAT32_BYTES = 4


class SavedWeights:
    """The weights of one checkpoint. `shapes`: the shape of each tensor, by name, in the order of the model."""

    def __init__(self, checkpoint: Path, *, average: bool = False) -> None:
        """Read the manifest. average: read the moving average of each weight that was trained.

        Errors: CheckpointError if the checkpoint has no average.
        """
        self.checkpoint = checkpoint
        self.manifest: Manifest = read_manifest(checkpoint)
        model = self.manifest.tensors.get("model", {})
        self.shapes = {name: tuple(entry["shape"]) for name, entry in model.items()}
        averages = self.manifest.tensors.get("optimizer", {}) if average else {}
        self._names = {name: f"{name}.{AVERAGE_KEY}" for name in model if f"{name}.{AVERAGE_KEY}" in averages}
        if average and not self._names:
            raise CheckpointError(
                f"ema: {checkpoint} has no moving average of its weights; leave --ema out, or train with ema_decay"
            )
        self._readers = {"model": TensorReader(checkpoint, "model")}
        if self._names:
            self._readers["optimizer"] = TensorReader(checkpoint, "optimizer")

    @property
    def averaged(self) -> list[str]:
        """The names of the weights that are read as averages."""
        return list(self._names)

    @property
    def num_bytes(self) -> int:
        """The size of all tensors in memory, in bytes."""
        return sum(torch.Size(shape).numel() * FLOAT32_BYTES for shape in self.shapes.values())

    def read(self, name: str, advance: Advance = no_progress) -> Tensor:
        """Return one tensor, on the CPU. advance: called with numbers of bytes read.

        Errors: CheckpointError if it is not what was saved.
        """
        kind = "optimizer" if name in self._names else "model"
        saved_name = self._names.get(name, name)
        value = self._readers[kind].read(saved_name, advance=advance)
        if tensor_digest(value, self.manifest.hashed) != self.manifest.tensors[kind][saved_name][self.manifest.hashed]:
            raise CheckpointError(f"{self.checkpoint}: {saved_name} is not what was saved; use another checkpoint")
        return value
