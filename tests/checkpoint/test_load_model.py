"""Loading a model from a checkpoint, without a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tinytrain_dist import CheckpointError, TransformerLM
from tinytrain_dist.checkpoint import load_model
from tinytrain_dist.checkpoint.sharded_io import write_checkpoint
from tinytrain_dist.checkpoint.state_collection import collect_shards


@pytest.fixture(scope="module")
def model(text_checkpoint: Path) -> TransformerLM:
    return load_model.load_model(text_checkpoint, torch.device("cpu"))


def test_the_model_has_the_weights_of_the_checkpoint(text_checkpoint: Path, model: TransformerLM) -> None:
    from tinytrain_dist.checkpoint.safetensors_io import TensorReader

    reader = TensorReader(text_checkpoint, "model")
    assert not torch.equal(model.lm_head.weight, TransformerLM(model.config).lm_head.weight)
    for name, value in model.state_dict().items():
        assert torch.equal(value, reader.read(name)), name


def test_a_checkpoint_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    write_checkpoint(tmp_path / "any", collect_shards(model, None)[0], {"step": 1})
    with pytest.raises(CheckpointError, match="holds no configuration"):
        load_model.load_model(tmp_path / "any", torch.device("cpu"))
