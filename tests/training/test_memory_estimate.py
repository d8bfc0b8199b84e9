"""Check that the memory estimate agrees with what a real step takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.forecasts import SMALL, estimated, meta_model, two_nodes
from tests.helpers.memory import CASES, MODEL, measure
from tests.helpers.ranks import run_ranks
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.training import forecast, memory_estimate


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_a_step_takes(name: str) -> None:
    ranks, settings = CASES[name]
    measured, predicted, moment = run_ranks(ranks, measure, {**MODEL, **settings})[0]
    print(f"{name}: measured {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f} MiB at {moment}")
    assert 0.90 < predicted / measured < 1.10, f"predicted {predicted:,} bytes, measured {measured:,}"


def test_deep_models_are_extrapolated_exactly(world: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in (
        {"parallel": "fsdp", "activation_checkpointing": "block", "micro_batch_size": 2},
        {"parallel": "hsdp", "precision": "bf16", "activation_checkpointing": "selective"},
    ):
        drawn = estimated(world, num_layers=9, **settings)
        monkeypatch.setattr(memory_estimate, "SIMULATED_DEPTHS", (9, 9))
        whole = estimated(world, num_layers=9, **settings)
        monkeypatch.undo()
        assert abs(drawn.nbytes - whole.nbytes) <= whole.nbytes // 1000
        assert forecast.sent_bytes(drawn, two_nodes()) == pytest.approx(
            forecast.sent_bytes(whole, two_nodes()), rel=1e-3
        )


def test_the_mask_of_documents_takes_memory_on_a_cpu_only(world: DistributedContext) -> None:
    settings: dict[str, Any] = {"parallel": "ddp", "context_len": 256, "micro_batch_size": 2, "batch_size": 8}
    for device, precision, added in (("cpu", "fp32", 4 * 2 * 256 * 256), ("cuda", "bf16", 0)):
        on_device, settings["precision"] = replace(world, simulated_type=device), precision
        without, with_mask = (estimated(on_device, document_mask=masked, **settings) for masked in (False, True))
        more = with_mask.nbytes - without.nbytes
        assert added <= more <= added + 2**18, f"{device}: {more:,}"


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab_size": 8192, "loss_chunk_tokens": 60, "z_loss": 1e-3},
        {"vocab_size": 8192, "loss_chunk_tokens": 30, "train_data": ("a", "b"), "precision": "bf16"},
    ],
    ids=["z-loss", "losses by source"],
)
def test_a_few_chunks_of_the_loss_have_the_memory_of_all(
    world: DistributedContext, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    few = estimated(world, parallel="ddp", **settings)
    monkeypatch.setattr(memory_estimate, "_simulate_few_chunks", lambda _: None)
    assert few == estimated(world, parallel="ddp", **settings)


def test_what_is_held_adds_up_to_the_parameters(world: DistributedContext) -> None:
    with_ddp, with_fsdp = estimated(world, parallel="ddp"), estimated(world, parallel="fsdp")
    weights = 4 * sum(p.numel() for p in meta_model().parameters())
    for found, share in ((with_ddp, 1), (with_fsdp, 4)):
        held = found.stages["update"]
        assert held["weights"] == pytest.approx(weights / share, rel=0.01)
        assert held["optimizer"] == pytest.approx(2 * weights / share, rel=0.01)
        assert held["gradients"] == pytest.approx(weights / share, rel=0.01)


def test_an_average_is_counted_where_it_is(world: DistributedContext) -> None:
    weights = 4 * sum(param.numel() for param in meta_model().parameters())
    on_gpus = replace(world, simulated_type="cuda")
    without, on_device, on_host = (
        estimated(on_gpus, parallel="fsdp", **settings)
        for settings in ({}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "ema_on_host": True})
    )
    held = [each.stages["update"]["optimizer"] for each in (without, on_device, on_host)]
    assert held[1] - held[0] == pytest.approx(weights / 4, rel=0.01)
    assert held[2] == held[0]
    assert without.host_bytes == on_device.host_bytes == 0
    assert on_host.host_bytes == pytest.approx(weights / 4, rel=0.01)
    assert on_host.nbytes - without.nbytes < weights / 40, "it is not counted under another name"


def test_inputs_of_blocks_move_to_the_host(world: DistributedContext) -> None:
    """All but that of the last block. On a CPU, the host is the device."""
    settings: dict[str, Any] = {"parallel": "fsdp", "num_layers": 9, "context_len": 256, "micro_batch_size": 2}
    settings["activation_checkpointing"] = "block"
    each_input = 4 * 2 * 256 * 64
    for device, moved in (("cuda", 8 * each_input), ("cpu", 0)):
        context = replace(world, simulated_type=device)
        stays, moves = (estimated(context, **settings, activation_offload=offload) for offload in (False, True))
        assert stays.host_bytes == 0
        assert moves.host_bytes == moved
        # when backward begins, only that of the last block is on the device, and one arrives while it computes
        kept = [each.stages["backward: last block"] for each in (stays, moves)]
        assert kept[0]["forward"] - kept[1]["forward"] == moved, device
        assert kept[0].total() - kept[1].total() == max(0, moved - each_input) or device == "cpu"
    odd = estimated(replace(world, simulated_type="cuda"), **{**settings, "d_model": 96}, activation_offload=True)
    assert odd.host_bytes == 8 * 2 * each_input, "pinned memory is rounded up to a power of two"


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_muon_holds_a_few_matrices_at_a_time(
    world: DistributedContext, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """On any number of layers. The state takes a number for each weight of a block."""
    held = {}
    for layers in (8, 16):
        monkeypatch.setattr(memory_estimate, "SIMULATED_DEPTHS", (layers, layers))
        held[layers] = estimated(world, num_layers=layers, parallel=mode, optimizer="muon").stages["update"]
    assert held[8]["update"] > 4 * 64 * 64, "at least a matrix"
    assert held[16]["update"] <= 1.02 * held[8]["update"]
    in_blocks = held[16]["weights"] - held[8]["weights"]
    assert held[16]["optimizer"] - held[8]["optimizer"] == pytest.approx(in_blocks, rel=0.05)


def test_groups_of_single_blocks_are_estimated_at_full_depth(world: DistributedContext) -> None:
    """Fewer blocks would have no parameter of this name. Muon keeps one number for each weight instead of two."""
    settings: dict[str, Any] = {"num_layers": 6, "parallel": "ddp"}
    all_alike, other_block = (
        estimated(world, **settings, param_groups=(f"{pattern}: optimizer=muon",))
        for pattern in ("*up_proj*", "*layers.5.*up_proj*")
    )
    up_proj = 4 * TrainingConfig(**SMALL).ffn_dim * SMALL["d_model"]
    more = other_block.stages["update"]["optimizer"] - all_alike.stages["update"]["optimizer"]
    assert more == pytest.approx(5 * up_proj, rel=0.01)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_a_rank_with_a_gpu_estimates_on_the_cpu_what_a_gpu_needs(world: DistributedContext, mode: str) -> None:
    """The mesh of a real run on GPUs is of type cuda; only the type of the device is replaced here."""
    config = TrainingConfig(**{**SMALL, "parallel": mode, "precision": "bf16"})
    meshed = world.with_mesh(choose_parallel_dims(config, 4, 2))
    simulated = memory_estimate.estimate_memory(config, replace(meshed, simulated_type="cuda"))
    found = memory_estimate.estimate_memory(config, replace(meshed, device=torch.device("cuda", 0), simulated_type=""))
    assert found.stages == simulated.stages
