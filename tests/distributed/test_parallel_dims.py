"""Check the mesh of each mode; no processes are needed to compute it."""

from __future__ import annotations

import pytest

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError


def mesh(config: TrainingConfig, world: int, local: int, fits: bool = True) -> tuple[str, int, int]:
    dims = choose_parallel_dims(config, world, local, fits)
    return dims.mode, dims.replicate, dims.shard


@pytest.mark.parametrize(
    ("world", "local", "fits", "expected"),
    [
        (1, 1, True, ("none", 1, 1)),
        (1, 1, False, ("none", 1, 1)),
        (8, 8, True, ("ddp", 8, 1)),
        (8, 4, True, ("ddp", 8, 1)),
        (8, 8, False, ("fsdp", 1, 8)),
        (8, 4, False, ("hsdp", 2, 4)),
        (8, 1, False, ("fsdp", 1, 8)),
    ],
)
def test_auto_chooses_by_what_fits(world, local, fits, expected):
    assert mesh(TrainingConfig(), world, local, fits) == expected


LARGE = {"vocab_size": 50_257, "num_layers": 12, "num_heads": 12, "d_model": 768}  # 163 million parameters


@pytest.mark.parametrize(
    ("settings", "world", "local", "fits", "expected"),
    [
        (LARGE, 8, 8, True, ("fsdp", 1, 8)),
        (LARGE, 16, 8, True, ("hsdp", 2, 8)),
        (LARGE, 16, 8, False, ("hsdp", 2, 8)),
        (LARGE, 1, 1, True, ("none", 1, 1)),
        (LARGE, 8, 1, True, ("ddp", 8, 1)),
        (LARGE, 6, 4, True, ("ddp", 6, 1)),  # nodes that are not equal
        ({**LARGE, "num_layers": 2}, 8, 8, True, ("ddp", 8, 1)),
        ({**LARGE, "reproducible": True, "micro_batch_size": 1}, 8, 8, True, ("ddp", 8, 1)),
        ({**LARGE, "parallel": "ddp"}, 8, 8, True, ("ddp", 8, 1)),
    ],
)
def test_auto_shards_a_large_model_inside_each_node_of_gpus(settings, world, local, fits, expected):
    config = TrainingConfig(**settings)
    dims = choose_parallel_dims(config, world, local, fits, "cuda")
    assert (dims.mode, dims.replicate, dims.shard) == expected
    if fits and config.parallel == "auto" and world > 1:
        assert mesh(config, world, local) == ("ddp", world, 1), "on CPUs the choice stays"


@pytest.mark.parametrize(
    ("settings", "world", "local", "expected"),
    [
        ({"parallel": "none"}, 1, 1, ("none", 1, 1)),
        ({"parallel": "ddp"}, 4, 4, ("ddp", 4, 1)),
        ({"parallel": "ddp"}, 1, 1, ("ddp", 1, 1)),
        ({"parallel": "fsdp"}, 6, 3, ("fsdp", 1, 6)),
        ({"parallel": "fsdp"}, 1, 1, ("fsdp", 1, 1)),
        ({"parallel": "hsdp"}, 8, 4, ("hsdp", 2, 4)),
        ({"parallel": "hsdp", "dp_shard": 2}, 8, 4, ("hsdp", 4, 2)),
        ({"parallel": "hsdp", "dp_replicate": 4}, 8, 8, ("hsdp", 4, 2)),
        ({"parallel": "hsdp", "dp_replicate": 2, "dp_shard": 4}, 8, 8, ("hsdp", 2, 4)),
        ({"parallel": "hsdp"}, 4, 4, ("fsdp", 1, 4)),
        ({"parallel": "hsdp", "dp_shard": 1}, 4, 4, ("ddp", 4, 1)),
        ({"parallel": "hsdp"}, 1, 1, ("ddp", 1, 1)),
    ],
)
def test_configured_modes(settings, world, local, expected):
    assert mesh(TrainingConfig(**settings), world, local) == expected


@pytest.mark.parametrize(
    ("settings", "world", "local", "expected", "replicas", "shards"),
    [
        ({"parallel": "none"}, 2, 2, ("none", 1, 1), 2, 1),
        ({"parallel": "ddp"}, 4, 4, ("ddp", 2, 1), 4, 1),
        ({"parallel": "fsdp"}, 4, 4, ("fsdp", 1, 2), 1, 4),
        ({"parallel": "fsdp"}, 2, 2, ("fsdp", 1, 1), 1, 2),
        ({"parallel": "hsdp"}, 8, 4, ("hsdp", 2, 2), 2, 4),
        ({"parallel": "hsdp", "dp_shard": 1}, 4, 4, ("hsdp", 2, 1), 2, 2),
        ({"parallel": "hsdp", "dp_replicate": 2}, 8, 8, ("hsdp", 2, 2), 2, 4),
        ({"parallel": "hsdp", "dp_shard": 1}, 2, 2, ("fsdp", 1, 1), 1, 2),
        ({"parallel": "auto"}, 2, 2, ("ddp", 1, 1), 2, 1),
        ({"parallel": "auto"}, 8, 4, ("ddp", 4, 1), 8, 1),
    ],
)
def test_weights_are_divided_over_more_ranks_than_data(settings, world, local, expected, replicas, shards):
    dims = choose_parallel_dims(TrainingConfig(**settings, num_heads=4, cp=2), world, local)
    assert (dims.mode, dims.replicate, dims.shard) == expected
    assert (dims.cp, dims.weight_replicas, dims.weight_shards) == (2, replicas, shards)
    assert "2 ranks for each sequence" in str(dims)


def test_auto_counts_all_ranks_that_hold_a_shard():
    config = TrainingConfig(**LARGE, cp=2)
    choices = [choose_parallel_dims(config, 16, 8, device_type="cuda"), choose_parallel_dims(config, 16, 8, False)]
    choices.append(choose_parallel_dims(config, 4, 4, fits=False))
    chosen = [(dims.mode, dims.replicate, dims.shard, dims.cp) for dims in choices]
    assert chosen == [("hsdp", 2, 4, 2), ("hsdp", 2, 4, 2), ("fsdp", 1, 2, 2)]


@pytest.mark.parametrize(
    ("settings", "world", "local", "message"),
    [
        ({}, 6, 3, r"cp: 2 does not divide the 3 process\(es\) of a node; possible: cp 1, or a multiple of 2"),
        ({}, 5, 4, r"cp: 2 does not divide the 5 processes; possible: cp 1, or a multiple of 2"),
        ({"cp": 4}, 6, 6, r"cp: 4 does not divide the 6 process\(es\) of a node; possible: cp 1, 2, or"),
        (
            {"parallel": "none"},
            4,
            4,
            "parallel: none runs on 2 processes with cp = 2, but there are 4; start 2 processes, or",
        ),
        ({"parallel": "hsdp", "dp_shard": 4}, 4, 4, "dp_shard: 4 does not divide the 2 groups of 2 processes"),
    ],
)
def test_ranks_that_cannot_share_sequences_are_refused(settings, world, local, message):
    with pytest.raises(ConfigError, match=message):
        choose_parallel_dims(TrainingConfig(**{"num_heads": 4, "cp": 2, **settings}), world, local)


def test_none_on_several_processes_is_an_error():
    with pytest.raises(ConfigError, match="parallel: none runs on 1 process, but there are 2"):
        choose_parallel_dims(TrainingConfig(parallel="none"), 2, 2)


@pytest.mark.parametrize(
    ("settings", "world", "local", "sentence"),
    [
        (
            {"dp_replicate": 3, "dp_shard": 4}, 8, 8,
            "dp_replicate x dp_shard: 3 x 4 = 12, but there are 8 processes; possible: dp_replicate x dp_shard 4 x 2, "
            "2 x 4",
        ),
        (
            {"dp_shard": 3}, 8, 8,
            "dp_shard: 3 does not divide the 8 processes; possible: dp_replicate x dp_shard 4 x 2, 2 x 4",
        ),
        (
            {}, 6, 4,
            "parallel: hsdp makes each node a replica, but 6 processes are not 4 on each node, as here; possible: "
            "dp_replicate x dp_shard 3 x 2, 2 x 3",
        ),
        (
            {"dp_replicate": 5}, 3, 3,
            "dp_replicate: 5 does not divide the 3 processes; possible: parallel = ddp or fsdp without dp_replicate",
        ),
        (
            {"dp_shard": 2, "fingerprint_every": 1}, 3, 3,
            "dp_shard: 2 does not divide the 3 processes; possible: parallel = ddp without dp_shard",
        ),
        (
            {"fingerprint_every": 1, "reshard_after_forward": True}, 3, 2,
            "parallel: hsdp makes each node a replica, but 3 processes are not 2 on each node, as here; possible: "
            "parallel = ddp without reshard_after_forward and fingerprint_every",
        ),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_cover_the_world_lists_those_that_do(settings, world, local, sentence):
    with pytest.raises(ConfigError) as caught:
        choose_parallel_dims(TrainingConfig(parallel="hsdp", **settings), world, local)
    assert caught.value.problems == [sentence]


def test_the_mesh_and_its_reason_are_printed():
    text = str(choose_parallel_dims(TrainingConfig(), 4, 4))
    assert text.startswith("parallel = ddp: 4 replica(s) x 1 shard(s); chosen because")
