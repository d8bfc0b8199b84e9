"""Check that all modes have the same weights, and each the FSDP units and wrappers that it needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.helpers.ranks import run_ranks
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.parallel import parallelize
from tinytrain_dist.parallel.parallelize import bucket_megabytes, wants_separate_reduce_scatters


def build(mode: str, replicate: int, shard: int, settings: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the wrapper, the number of FSDP units, and all weights."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    from tests.helpers.training import TINY
    from tinytrain_dist import gather_full_state_dict
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.parallel.parallelize import build_model

    context = init_distributed("cpu").with_mesh(ParallelDims(mode, replicate, shard, ""))
    model = build_model(TrainingConfig(**{**TINY, "vocab_size": 53, **settings}), context)
    return {
        "ddp": isinstance(model, DistributedDataParallel),
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "weights": gather_full_state_dict(model),
        "resharded": resharded_parts(model),
    }


def resharded_parts(model: Any) -> list[str]:
    """The parts of an FSDP model whose weights are not gathered any more after a forward pass."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return []
    ids = torch.zeros(2, 4, dtype=torch.int64)
    loss = model(ids, ids)
    parts = {"head": model.lm_head, **{f"block {i}": block for i, block in enumerate(model.model.layers)}}
    resharded = [name for name, part in parts.items() if isinstance(next(part.parameters()), DTensor)]
    loss.backward()
    return resharded


def test_ddp_has_larger_buckets_only_between_nodes_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    one_node, two_nodes = (DistributedContext(0, 0, 4, local, "host", torch.device("cpu")) for local in (4, 2))
    assert bucket_megabytes(two_nodes, "cuda") == 100
    assert bucket_megabytes(one_node, "cuda") is None
    assert bucket_megabytes(two_nodes, "cpu") is None, "the bits of runs on CPUs stay"
    given = {}
    monkeypatch.setattr(DistributedContext, "group", lambda *_: None)
    monkeypatch.setattr(parallelize, "DistributedDataParallel", lambda model, **options: given.update(options) or model)
    monkeypatch.setattr(parallelize, "keep_group", lambda *_: None)
    monkeypatch.setattr(torch.nn.Linear, "process_group", None, raising=False)
    monkeypatch.setattr(parallelize, "bucket_megabytes", lambda context, device_type: (device_type, 7))
    parallelize.replicate_with_ddp(torch.nn.Linear(2, 2), two_nodes)
    assert given["bucket_cap_mb"] == ("cpu", 7)


def test_reduce_scatters_are_separate_only_in_a_replica_on_several_nodes_with_gpus() -> None:
    nodes_of_two = DistributedContext(0, 0, 4, 2, "host", torch.device("cpu"))
    fsdp = dataclasses.replace(nodes_of_two, parallel_dims=ParallelDims("fsdp", 1, 4, ""))
    hsdp = dataclasses.replace(nodes_of_two, parallel_dims=ParallelDims("hsdp", 2, 2, ""))
    config = TrainingConfig(vocab_size=53)
    assert wants_separate_reduce_scatters(config, fsdp, "cuda")
    assert not wants_separate_reduce_scatters(config, hsdp, "cuda"), "its replicas are inside nodes"
    assert not wants_separate_reduce_scatters(config, fsdp, "cpu")
    exact = dataclasses.replace(config, reproducible=True, micro_batch_size=1)
    assert not wants_separate_reduce_scatters(exact, fsdp, "cuda")


def step_with_and_without_separate_group(dims: ParallelDims) -> dict[str, Any]:
    """On a rank: the gradients of a step in both ways, and which groups reduce-scatter and gather."""
    from tests.helpers.training import TINY
    from tinytrain_dist.distributed.batch_plan import BatchPlan
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.dtensor import local_tensor
    from tinytrain_dist.parallel.grad_reduction import build_grad_reduction
    from tinytrain_dist.parallel.parallelize import build_model

    config = TrainingConfig(**{**TINY, "vocab_size": 53, "batch_size": 4})
    context = init_distributed("cpu").with_mesh(dims)
    grads, groups = [], []
    for separate in (False, True, True):
        parallelize.wants_separate_reduce_scatters = lambda *_, separate=separate: separate
        model: Any = build_model(config, context)
        plan = BatchPlan.make(config, dims)
        share = plan.share(context.replica, context.shard)
        reduction = build_grad_reduction(model, plan, context, deterministic=False)
        reduction.before_micro_step(share, 0)
        ids = torch.arange(12).view(1, 12) + context.rank
        model(ids, ids).backward()
        reduction.after_micro_step(share, 0)
        grads.append([local_tensor(param.grad).clone() for param in model.parameters()])
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        states = [unit._get_fsdp_state() for unit in units]
        # torch 2.11 has one group of parameters in a unit, and no group for reduce-scatters
        of_units = [getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states]
        meshes: list[Any] = [group.mesh_info for of_unit in of_units for group in of_unit]
        own = [getattr(mesh, "reduce_scatter_process_group", None) for mesh in meshes]
        groups.append([(group, mesh.shard_process_group) for group, mesh in zip(own, meshes, strict=True)])
    plain, first, second = groups
    return {
        "equal": all(torch.equal(*pair) for pair in zip(grads[0], grads[1], strict=True)),
        "plain": {own for own, _ in plain} == {None},
        "separate": all(own is not None and own != shards for own, shards in first),
        "number": len({own for own, _ in [*first, *second]}),
    }


@pytest.mark.multiprocess
def test_a_separate_group_changes_no_bits_and_is_made_once() -> None:
    for result in run_ranks(4, step_with_and_without_separate_group, ParallelDims("hsdp", 2, 2, "")):
        if not hasattr(FSDPModule, "set_separate_reduce_scatter_group"):  # before torch 2.13
            assert result == {"equal": True, "plain": True, "separate": False, "number": 1}
        else:
            assert result == {"equal": True, "plain": True, "separate": True, "number": 1}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("settings", "units", "resharded"),
    [
        ({}, 5, ["block 0"]),
        ({"tie_embeddings": True}, 5, ["block 0"]),
        ({"reshard_after_forward": False}, 5, []),
    ],
    ids=["untied", "tied", "kept"],
)
def test_every_mode_has_the_same_weights_and_its_own_wrapper(
    settings: dict[str, Any], units: int, resharded: list[str]
) -> None:
    alone = run_ranks(1, build, "none", 1, 1, settings)[0]
    assert (alone["ddp"], alone["units"]) == (False, 0)
    for mode, replicate, shard in (("ddp", 2, 1), ("fsdp", 1, 2), ("hsdp", 2, 2)):
        for result in run_ranks(replicate * shard, build, mode, replicate, shard, settings):
            assert result["ddp"] == (mode == "ddp")
            assert result["units"] == (0 if mode == "ddp" else units)  # embedding, head, two blocks, the rest
            assert result["resharded"] == ([] if mode == "ddp" else resharded)
            assert result["weights"].keys() == alone["weights"].keys()
            assert all(torch.equal(result["weights"][name], value) for name, value in alone["weights"].items()), mode
