"""Owns apply_ddp, apply_fsdp and gather_full_state_dict for people who bring their own model and loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.multiprocess


class Blocks(nn.Module):
    """Somebody's model: a ModuleList two levels down, tied weights, a buffer, a dimension of 3."""

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
    torch.manual_seed(context.rank)  # a careless user: every rank another model; rank 0's must win
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
    """save_checkpoint and load_checkpoint are collectives where there is a process group."""
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


def settle_each(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[bool | None, str]]:
    """What `compile` becomes in each case; what its compiler says is said on the last rank only."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.errors import ConfigError
    from tinytrain_dist.parallel import compile

    context, results = init_distributed("cpu"), []
    for compiler, settings in cases:
        compile.why_not_compile = lambda *_, said=compiler: said if context.rank else ""  # type: ignore[misc]
        config = TrainingConfig(vocab_size=1000, micro_batch_size=1, **settings)
        try:
            config, text = compile.resolve_compile(config, context)
            results.append((config.compile, text))
        except ConfigError as error:
            results.append((None, str(error)))
    return results


def test_compile_is_decided_for_all_ranks_and_said() -> None:
    long, short = {"total_steps": 10**6}, {"total_steps": 10}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("", short),
        ("", long),
        ("no g++", long),
        ("no g++", short),
        ("no g++", {**long, "reproducible": True}),
        ("no g++", {**short, "compile": True}),
        ("", {**short, "compile": True}),
        ("no g++", {**long, "compile": False}),
    ]
    first, second = run_ranks(2, settle_each, cases)
    assert first == second, "all ranks decide the same"
    assert [compiled for compiled, _ in first] == [False, True, False, False, None, None, True, False]
    assert "no g++); continuing without it" in first[2][1]
    assert "compile: torch.compile does not work on" in first[4][1]
    assert "set compile = false" in first[5][1]
    assert first[0][1] == first[3][1] == first[7][1] == ""


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytrain_dist.parallel.compile import why_not_compile

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_not_compile(torch.device("cpu")) == "RuntimeError: no compiler"


def test_bits_are_not_left_to_a_compiler_that_skips_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytrain_dist.parallel import compile

    cpu = torch.device("cpu")
    for without, version, exact, refused in (
        (True, "2.12.1", True, True),
        (True, "2.13.0+cpu", True, False),
        (True, "2.12.1", False, False),
        (False, "2.12.1", True, False),
    ):
        monkeypatch.setattr(compile, "CPU_LACKS_BF16", without)
        monkeypatch.setattr(torch, "__version__", version)
        assert ("leaves out roundings" in compile.why_not_compile(cpu, exact)) == refused


# ---------------------------------------------------------------- messages over gloo


def gathers(world_size: int) -> list[Any]:
    from tinytrain_dist.distributed import collectives
    from tinytrain_dist.distributed.context import init_distributed, shutdown

    context = init_distributed("cpu")
    mine = torch.full((2, 3), float(context.rank))
    fresh, inside = torch.empty(world_size * 6), torch.full((world_size * 6,), -1.0)
    collectives.all_gather(fresh, mine, None)
    own = inside[context.rank * 6 : (context.rank + 1) * 6]
    own.fill_(context.rank)
    second = torch.empty(world_size * 6)
    under_way = [  # two at once meet their own
        collectives.all_gather(inside, None, None, wait=False),
        collectives.all_gather(second, mine + 10, None, wait=False),
    ]
    for work in reversed(under_way):
        work.wait()
    shutdown()
    return [fresh.tolist(), inside.tolist(), second.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gathers_all_parts_in_order(world_size: int) -> None:
    expected = [float(rank) for rank in range(world_size) for _ in range(6)]
    for found in run_ranks(world_size, gathers, world_size):
        assert found == [expected, expected, [value + 10 for value in expected]]


def test_the_tree_takes_any_number_of_parts() -> None:
    from tinytrain_dist.parallel.tree_reduction import tree_sum

    for count in range(1, 10):
        parts = torch.arange(count * 2, dtype=torch.float32).view(count, 2)
        assert tree_sum(parts).tolist() == parts.sum(0).tolist()
    big, small = torch.tensor([[2.0**24], [1.0], [1.0], [1.0], [-(2.0**24)]]), 2.0
    assert tree_sum(big).item() == small  # ((2^24 + 1) + (1 + 1)) - 2^24, the first sum rounded down


def where_collectives_go(settings: dict[str, Any]) -> list[str]:
    from tests.helpers.training import fit

    seen: set[str] = set()
    slow = ("reduce_scatter_tensor", "reduce_scatter_single", "all_gather_into_tensor", "all_gather_single")
    for name in ("isend", "all_to_all_single", *slow):
        plain = getattr(torch.distributed, name, None)  # the names of the slow ones depend on the version

        def noted(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            seen.add(name)
            return plain(*args, **kwargs)

        setattr(torch.distributed, name, noted)
    fit(settings)
    return sorted(seen)


def test_fsdp_on_gloo_takes_the_fast_ways_and_any_number_of_shards(tmp_path: Path) -> None:
    from tests.helpers.training import Run, settings_for

    common = {"total_steps": 3, "batch_size": 6, "micro_batch_size": 1, "eval_every": 100, "ckpt_every": 100}
    found = run_ranks(3, where_collectives_go, settings_for(tmp_path, "sharded", parallel="fsdp", **common))
    assert found == [["all_to_all_single", "isend"]] * 3
    run_ranks(1, where_collectives_go, settings_for(tmp_path, "alone", parallel="none", **common))
    losses = [Run(tmp_path / name).values("train", "loss") for name in ("sharded", "alone")]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
