"""Train on from the weights of a run with a longer context and scaled rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import some_ids
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit_all, settings_for, train
from tests.training.test_trainer import fit_error
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.config.loading import load_config
from tinytrain_dist.model.huggingface_config import check_hf_config

MODEL: dict[str, Any] = {"head_dim": 8, "parallel": "fsdp"}
LONGER: dict[str, Any] = {**MODEL, "context_len": 48, "rope_scaling_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear"},
    "dynamic": {"rope_type": "dynamic", "rope_original_context_len": 12},
    "yarn": {"rope_type": "yarn", "rope_original_context_len": 12},
    "llama3": {"rope_type": "llama3", "rope_original_context_len": 12},
}


def test_a_run_extends_the_context_of_another(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = train(tmp_path, "base", 1, **MODEL, total_steps=6)
    source = {"init_from": str(tmp_path / "base"), "lr_max": 1e-12, "lr_min": 0.0, "total_steps": 3}
    runs = [settings_for(tmp_path, kind, **LONGER, **scaling, **source) for kind, scaling in SCALINGS.items()]
    run_ranks(2, fit_all, runs)
    for kind, scaling in SCALINGS.items():
        run = Run(tmp_path / kind)
        (text,) = run.values("initialized", "text")
        assert text == f"started from the weights in {base.checkpoint}"
        torch.testing.assert_close(run.weights(), base.weights(), rtol=1e-5, atol=1e-6)
        recorded = load_config(tmp_path / kind / "config.toml")
        assert {name: getattr(recorded, name) for name in scaling} == scaling
        check_hf_config(recorded, run.checkpoint)  # so that a run can go on from this checkpoint
        ours = load_model(run.checkpoint, torch.device("cpu"))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run.checkpoint, local_files_only=True)
        for length in (7, 48):
            ids = some_ids(ours.config, length=length)
            torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.model.rotary.frequencies(), theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
        assert run.values("eval", "loss")[-1] == pytest.approx(base.values("eval", "loss")[-1], abs=0.2)

    resumed = settings_for(tmp_path, "base", **LONGER, **SCALINGS["yarn"], total_steps=8)
    message = run_ranks(1, fit_error, resumed)[0]
    assert "belongs to another run" in message
    assert "context_len: 12 in the checkpoint, 48 now" in message
    assert "rope_type: None in the checkpoint, yarn now" in message
