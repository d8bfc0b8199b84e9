"""Check what is recorded of the inside of a model: by plain formulas, in every layout, and without changing bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for

pytestmark = pytest.mark.multiprocess

SETTINGS: dict[str, Any] = {
    "total_steps": 4,
    "stability_every": 4,
    "log_every": 2,
    "ckpt_every": 3,
    "eval_every": 99,
    "micro_batch_size": 2,
    "reproducible": True,
    "z_loss": 1e-2,
    "logit_soft_cap": 4.0,
}
GROUPS = ("activation_rms_by_layer", "attention_logit_max_by_layer", "grad_rms_by_layer", "stability")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same run in one process, on two ranks of each kind, compiled, and without the measurements."""
    folder = tmp_path_factory.mktemp("stability")
    variants: dict[str, tuple[int, dict[str, Any]]] = {
        "alone": (1, {"parallel": "none"}),
        "ddp": (2, {"parallel": "ddp"}),
        "fsdp": (2, {"parallel": "fsdp"}),
        "compiled": (1, {"parallel": "none", "compile": True}),
        "silent": (1, {"parallel": "none", "stability_every": None}),
    }
    for name, (ranks, changes) in variants.items():
        run_ranks(ranks, fit, settings_for(folder, name, **SETTINGS | changes))
    return {name: Run(folder / name) for name in variants}


def record_of(run: Run, step: int) -> dict[str, Any]:
    (record,) = [record for record in run.records if (record["kind"], record["step"]) == ("train", step)]
    return record


def test_the_numbers_are_the_same_in_every_layout_and_nearly_so_when_compiled(runs: dict[str, Run]) -> None:
    alone = record_of(runs["alone"], 4)
    for name in ("ddp", "fsdp"):
        record = record_of(runs[name], 4)
        exact = [group for group in GROUPS if group != "grad_rms_by_layer"]  # norms by layer are not summed in a tree
        assert {group: record[group] for group in exact} == {group: alone[group] for group in exact}
        assert record["grad_rms_by_layer"] == pytest.approx(alone["grad_rms_by_layer"], rel=1e-6)
        assert runs[name].values("train", "z_loss") == runs["alone"].values("train", "z_loss")
    compiled = record_of(runs["compiled"], 4)
    assert not [record for record in runs["compiled"].records if record["kind"] == "recompiled"]
    for group in GROUPS:
        assert compiled[group] == pytest.approx(alone[group], rel=1e-3)
    for run in runs.values():
        assert not any(group in record_of(run, 2) for group in GROUPS)
    assert not any(group in record_of(runs["silent"], 4) for group in GROUPS)


def test_measuring_changes_no_bit(runs: dict[str, Run]) -> None:
    for name in ("ddp", "fsdp", "silent"):
        assert runs[name].digests() == runs["alone"].digests()


def test_the_numbers_are_those_of_the_formulas(runs: dict[str, Run]) -> None:
    """The weights before step 4 were saved, so a plain model measures the same on the batch of this step."""
    import json

    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.data.token_dataset import TokenDataset
    from tinytrain_dist.model.attention import RotaryEmbedding, apply_rotary_pos_emb
    from tinytrain_dist.model.transformer import TransformerLM
    from tinytrain_dist.training.run_data import open_run_data

    run = runs["alone"]
    checkpoint = min((run.folder / "checkpoints").glob("checkpoint-????????"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["step"] == 3
    config = TrainingConfig.from_dict(state["config"])
    model = TransformerLM(config)
    from tinytrain_dist.checkpoint.safetensors_io import TensorReader

    reader = TensorReader(checkpoint, "model")
    model.load_state_dict({name: reader.read(name) for name in reader.files})
    data: TokenDataset = open_run_data(config).train
    tokens = data.training_windows(config.seed, 3, range(config.batch_size)).tokens.long()
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    record = record_of(run, 4)

    inputs, outputs = [], []
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda _, __, y: outputs.append(y))
    (model(ids, targets) / targets.numel()).backward()
    cos, sin = RotaryEmbedding(config.head_width, config.rope_theta)(torch.arange(config.context_len))
    causal = torch.ones(config.context_len, config.context_len, dtype=torch.bool).tril()
    for number, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
        attention = model.model.layers[number].self_attn
        q = attention.q_proj(x).view(*x.shape[:2], -1, config.head_width).transpose(1, 2)
        k = attention.k_proj(x).view(*x.shape[:2], -1, config.head_width).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = (q @ k.transpose(2, 3) / math.sqrt(config.head_width)).masked_fill(~causal, -math.inf)
        name = f"layers.{number}"
        assert record["attention_logit_max_by_layer"][name] == pytest.approx(scores.max().item(), rel=1e-5)
        assert record["activation_rms_by_layer"][name] == pytest.approx(y.square().mean().sqrt().item(), rel=1e-5)
        grads = torch.cat([param.grad.flatten() for param in model.model.layers[number].parameters()])
        assert record["grad_rms_by_layer"][name] == pytest.approx(grads.square().mean().sqrt().item(), rel=1e-4)
    stability = record["stability"]
    assert stability["embedding_norm_max"] == pytest.approx(
        model.model.embed_tokens.weight.norm(dim=1).max().item(), rel=1e-6
    )
    assert stability["attention_logit_max"] == max(record["attention_logit_max_by_layer"].values())
    logits = model(ids)
    assert logits.abs().max() < 4.0
    assert record["z_loss"] == pytest.approx(1e-2 * logits.logsumexp(-1).square().mean().item(), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5), "without the z-loss"


def test_the_checkpoint_of_a_capped_model_is_no_llama_and_is_not_exported(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from tinytrain_dist.cli.main import main
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.model.huggingface_config import check_hf_config, settings_of_hf_folder

    checkpoint = runs["alone"].checkpoint
    described = json.loads((checkpoint / "config.json").read_text())
    assert (described["model_type"], described["final_logit_softcapping"]) == ("llama_soft_capped", 4.0)
    assert settings_of_hf_folder(checkpoint)["logit_soft_cap"] == 4.0
    config = TrainingConfig.from_dict(json.loads((checkpoint / "trainer_state.json").read_text())["config"])
    check_hf_config(config, checkpoint)
    assert main(["export", str(runs["alone"].folder), str(tmp_path / "out")]) == 2
    assert "was trained with logit_soft_cap = 4, which Llama and Qwen3 do not have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="llama_soft_capped"):
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
