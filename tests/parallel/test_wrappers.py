"""apply_ddp, apply_fsdp and gather_full_state_dict, for users with their own model and loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.multiprocess


class Blocks(nn.Module):
    """A user's model: a ModuleList two levels down, tied weights, a buffer, a dimension of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Module()
        self.body.stages = nn.ModuleList(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for stage in self.body.stages:
            x = x + stage(x)
        return self.head(x * self.scale)


def batch() -> torch.Tensor:
    return torch.arange(8).reshape(4, 2) % 11


def reference() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch()).flatten(0, 1), batch().flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return model.state_dict()


def own_loop(wrap: str, param_dtype: torch.dtype | None) -> dict[str, Any]:
    from tinytrain_dist import AdamW, apply_ddp, apply_fsdp, clip_gradients, gather_full_state_dict
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims

    context = init_distributed("cpu")
    torch.manual_seed(
        context.rank
    )  # as if the user forgot the seed: ranks have different models, and all must get that of rank 0
    model: nn.Module = Blocks()
    world = context.world_size
    if wrap == "ddp":
        model = apply_ddp(model)
    elif wrap == "fsdp":
        mesh = context.with_mesh(ParallelDims("fsdp", 1, world, "")).mesh
        assert mesh is not None
        model = apply_fsdp(model, mesh["dp_shard"], param_dtype=param_dtype)
    else:
        mesh = context.with_mesh(ParallelDims("hsdp", world // 2, 2, "")).mesh
        assert mesh is not None
        model = apply_fsdp(model, mesh, param_dtype=param_dtype)
    optimizer = AdamW(model.parameters(), 0.1, (0.9, 0.999), 1e-8, 0.01)
    mine = batch().chunk(world)[context.rank]
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(mine).flatten(0, 1).float(), mine.flatten()).backward()
        norms.append(float(clip_gradients(model.parameters(), 0.1)))
        optimizer.step()
    return {
        "state": gather_full_state_dict(model),
        "norms": norms,
        "dtypes": {param.dtype for param in model.parameters()} | {param.grad.dtype for param in model.parameters()},
    }


@pytest.mark.parametrize(("wrap", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_own_loop_equals_one_process(wrap: str, ranks: int) -> None:
    results = run_ranks(ranks, own_loop, wrap, None)
    expected = reference()
    for result in results:
        assert result["state"].keys() == expected.keys()
        torch.testing.assert_close(result["state"], expected, rtol=1e-4, atol=1e-5)
        assert result["norms"] == results[0]["norms"]
        assert result["dtypes"] == {torch.float32}


def test_bf16_keeps_master_weights_and_gradients_in_float32() -> None:
    results = run_ranks(2, own_loop, "fsdp", torch.bfloat16)
    assert results[0]["dtypes"] == {torch.float32}
    torch.testing.assert_close(results[0]["state"], reference(), rtol=0.2, atol=0.1)
    assert any(not torch.equal(results[0]["state"][key], value) for key, value in reference().items())


def refusals() -> list[str]:
    from tinytrain_dist import apply_ddp, apply_fsdp
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims

    mesh = init_distributed("cpu").with_mesh(ParallelDims("hsdp", 1, 1, "")).mesh
    messages = []
    for call in (lambda: apply_ddp(Blocks(), mesh), lambda: apply_fsdp(Blocks().bfloat16(), mesh)):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_refusals_say_what_to_do() -> None:
    ddp, fsdp = run_ranks(1, refusals)[0]
    assert "one axis, got 2 axes" in ddp
    assert "call model.float() first" in fsdp


def save_under(wrap: str, folder: str) -> int:
    """On a rank: save in one mode and load in another. Both functions are collectives in a process group."""
    from tinytrain_dist import AdamW, apply_ddp, apply_fsdp, load_checkpoint, save_checkpoint
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims

    context = init_distributed("cpu")
    torch.manual_seed(0)
    model: nn.Module = Blocks()
    if wrap == "ddp":
        model = apply_ddp(model)
    else:
        mesh = context.with_mesh(ParallelDims("fsdp", 1, context.world_size, "")).mesh
        assert mesh is not None
        model = apply_fsdp(model, mesh["dp_shard"])
    optimizer = AdamW(model.parameters(), 0.1)
    optimizer.materialize()
    if not Path(folder).exists() or wrap == "ddp":
        save_checkpoint(model, optimizer, 7, folder)
    context.barrier()
    return load_checkpoint(model, optimizer, folder)


def test_own_loop_saves_on_ddp_and_loads_on_fsdp(tmp_path: Path) -> None:
    assert run_ranks(2, save_under, "ddp", str(tmp_path / "c")) == [7, 7]
    assert run_ranks(4, save_under, "fsdp", str(tmp_path / "c")) == [7, 7, 7, 7]
