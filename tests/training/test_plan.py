"""Owns what the plan promises: the estimate is what a step takes, the verdict follows, and `auto` acts on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.memory import CASES, MODEL, measure
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tinytrain_dist.cli.main import main as tinytrain
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives, fake_backend
from tinytrain_dist.distributed.batch_plan import possible_micro_batch_sizes
from tinytrain_dist.distributed.context import DistributedContext, shutdown
from tinytrain_dist.distributed.parallel_dims import ParallelDims, choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, GIB, find_device_spec
from tinytrain_dist.training import forecast, memory_estimate

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {**MODEL, "num_layers": 2, "d_model": 64}


@pytest.fixture
def world() -> Iterator[DistributedContext]:
    """Rank 0 of 2 nodes x 2 devices that are not there."""
    yield fake_backend.fake_context(4, 2)
    shutdown()


def estimated(context: DistributedContext, **settings: Any) -> memory_estimate.MemoryEstimate:
    config = TrainingConfig(**{**SMALL, **settings})
    layout = choose_parallel_dims(config, context.world_size, context.local_world_size)
    return memory_estimate.estimate_memory(config, context.with_mesh(layout))


# ---------------------------------------------------------------- held against reality


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_a_step_takes(name: str) -> None:
    ranks, settings = CASES[name]
    measured, predicted, moment = run_ranks(ranks, measure, {**MODEL, **settings})[0]
    print(f"{name}: measured {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f} MiB at {moment}")
    assert 0.90 < predicted / measured < 1.10, f"predicted {predicted:,} bytes, measured {measured:,}"


def test_deep_models_are_drawn_out_exactly(world: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_is_held_adds_up_to_the_parameters(world: DistributedContext) -> None:
    with_ddp, with_fsdp = estimated(world, parallel="ddp"), estimated(world, parallel="fsdp")
    weights = 4 * sum(p.numel() for p in meta_model().parameters())
    for found, share in ((with_ddp, 1), (with_fsdp, 4)):
        held = found.stages["update"]
        assert held["weights"] == pytest.approx(weights / share, rel=0.01)
        assert held["optimizer"] == pytest.approx(2 * weights / share, rel=0.01)
        assert held["gradients"] == pytest.approx(weights / share, rel=0.01)


def meta_model() -> Any:
    import torch

    from tinytrain_dist.model.transformer import TransformerLM

    with torch.device("meta"):
        return TransformerLM(TrainingConfig(**SMALL))


def two_nodes() -> forecast.Cluster:
    return forecast.Cluster(2, 2, DEVICE_SPECS["h100"])


def test_bytes_on_the_wire(world: DistributedContext) -> None:
    weights = 4 * sum(p.numel() for p in meta_model().parameters())
    # one ring over four ranks on two nodes: 2 x 3/4 past every rank, and as much out of each node
    sent = forecast.sent_bytes(estimated(world, parallel="ddp"), two_nodes())
    assert sent == pytest.approx((1.5 * weights, 1.5 * weights), rel=0.01)
    # gathered in forward, and all blocks but the last in backward as well; scattered once; each in each of two passes
    once = forecast.sent_bytes(estimated(world, parallel="fsdp", micro_batch_size=4), two_nodes())
    twice = forecast.sent_bytes(estimated(world, parallel="fsdp", micro_batch_size=2), two_nodes())
    assert twice == pytest.approx([2 * each for each in once], rel=0.01)
    again = 4 * sum(p.numel() for block in meta_model().model.layers[:-1] for p in block.parameters())
    assert once[0] == pytest.approx(0.75 * (2 * weights + again), rel=0.01)
    # shards inside a node, replicas across: only halves of the gradients leave it, from both ranks
    _, across = forecast.sent_bytes(estimated(world, parallel="hsdp"), two_nodes())
    assert across == pytest.approx(2 * weights / 2, rel=0.01)
    # all-to-all and all-gather instead of a ring: each rank sends half of its gradients to the other node, then parts
    _, across = forecast.sent_bytes(
        estimated(world, parallel="ddp", reproducible=True, micro_batch_size=4), two_nodes()
    )
    assert across == pytest.approx(2 * weights / 2 + 0.75 * weights, rel=0.02)


# ---------------------------------------------------------------- the command


def run_plan(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = tinytrain(["plan", *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_fits_the_hardware_it_names(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes, per_node, device = {
        "gpt2_124m_ddp": (1, 8, "a100-40gb"),
        "llama_350m_fsdp": (1, 8, "rtx4090"),
        "llama_1b_hsdp": (4, 8, "a100-40gb"),
        "quickstart": (1, 2, "cpu"),
        "tinystories": (1, 1, "h100"),
    }[config.stem]
    where = ("--nodes", str(nodes), "--devices-per-node", str(per_node), "--device", device)
    code, text = run_plan(capsys, str(config), *where, "--vocab-size", "32000")
    assert code == 0, text
    assert "\nFITS" in text
    assert "tokens a day" in text


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    args = (str(ROOT / "configs/llama_1b_hsdp.toml"), "--nodes", "1", "--devices-per-node", "8", "--device", "rtx4090")
    big = ("--vocab-size", "32000", "--micro-batch-size", "16", "--activation-checkpointing", "none")
    code, text = run_plan(capsys, *args, *big)
    assert code == 1, text
    assert "DOES NOT FIT: fits with " in text
    name, value = text.split("DOES NOT FIT: fits with ")[1].split(":")[0].split(" = ")
    again, text = run_plan(capsys, *args, *big, f"--{name}", value)
    assert again == 0, text


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--device", "h10"), "device: 'h10' is not in the table; nearest: h100"),
        (("--nodes", "0"), "--nodes: '0' must be a whole number, at least 1"),
        (("--devices-per-node", "three"), "--devices-per-node: 'three' must be a whole number"),
        (("--devices-per-node", "3"), "batch_size: 16 is not a multiple of micro_batch_size 8 x 3 ranks = 24"),
        (("--devices-per-node", "4", "--parallel", "none"), "parallel: none runs on 1 process, but there are 4"),
        (("--micro-batch-siz", "4"), "micro_batch_siz: unknown setting; did you mean micro_batch_size?"),
    ],
)
def test_what_cannot_run_is_refused_in_the_words_of_a_run(
    args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_plan(capsys, str(ROOT / "configs/quickstart.toml"), "--vocab-size", "4096", *args)
    assert code == 2
    assert sentence in text


def test_the_vocabulary_must_be_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = ("--train-data", str(tmp_path / "train.npy"))
    code, text = run_plan(capsys, str(ROOT / "configs/quickstart.toml"), *data)
    assert code == 2
    assert "vocab_size: not set, and there is no" in text


def test_auto_shards_when_one_device_is_too_small(world: DistributedContext) -> None:
    config = TrainingConfig(**{**SMALL, "parallel": "auto"})
    for memory, mode in ((1e12, "ddp"), (1e3, "hsdp")):
        device = dataclasses.replace(DEVICE_SPECS["h100"], memory=memory, context=0)
        assert forecast.forecast(config, world, forecast.Cluster(2, 2, device), 1.0).parallel_dims.mode == mode


def test_the_table_of_devices() -> None:
    for device in DEVICE_SPECS.values():
        assert 20 * GIB < device.memory < 200 * GIB
        assert device.bf16_flops > device.fp32_flops > 1e13
    cpu = find_device_spec("cpu", 2, "fp32")
    assert cpu.memory > GIB / 4
    assert cpu.fp32_flops > 1e9


# ---------------------------------------------------------------- micro_batch_size = auto


def test_sizes_that_divide() -> None:
    config = TrainingConfig(batch_size=24, micro_batch_size="auto")
    assert possible_micro_batch_sizes(config, ParallelDims("ddp", 2, 1, "")) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(ConfigError, match="micro_batch_size: must be set with reproducible = true, to a number"):
        TrainingConfig(micro_batch_size="auto", reproducible=True)
    with pytest.raises(ConfigError, match="micro_batch_size: 'all' is not a whole number or one of auto or None"):
        TrainingConfig.from_dict({"micro_batch_size": "all"})


def out_of_memory_above(most: int, rank: int) -> None:
    """Let the blocks of one rank run out of memory in forward when they get more than `most` sequences."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    from tinytrain_dist.model.transformer import TransformerBlock

    plain = TransformerBlock.forward

    def forward(self: Any, x: Any, *args: Any) -> Any:
        if x.shape[0] > most and collectives.get_rank() == rank and not isinstance(x, FakeTensor):
            raise torch.OutOfMemoryError("injected")
        return plain(self, x, *args)

    TransformerBlock.forward = forward  # type: ignore[method-assign]


def fit_small(settings: dict[str, Any], most: int | None, room: float | None = None) -> str:
    """On a rank: train where memory is short; what went wrong, if anything did."""
    from tinytrain_dist.training import fitting

    if most is not None:
        out_of_memory_above(most, rank=1)
    if room is not None:
        fitting.free_memory_bytes = lambda *_: room / memory_estimate.USABLE_MEMORY
    try:
        fit(settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_out_of_memory_on_one_rank_makes_all_fall_back(mode: str, tmp_path: Path) -> None:
    auto = settings_for(tmp_path, "auto", parallel=mode, micro_batch_size="auto")
    errors = run_ranks(2, fit_small, auto, 1)
    assert errors == ["", ""]
    fixed = settings_for(tmp_path, "fixed", parallel=mode, micro_batch_size=1)
    run_ranks(2, fit_small, fixed, None)
    assert "micro_batch_size = 1\n" in (tmp_path / "auto" / "config.toml").read_text()
    assert Run(tmp_path / "auto").digests() == Run(tmp_path / "fixed").digests(), "a trial must leave no trace"


@pytest.mark.multiprocess
def test_auto_takes_what_the_estimate_lets_pass_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], world: DistributedContext
) -> None:
    settings = settings_for(tmp_path, "auto", parallel="none", micro_batch_size="auto", vocab_size=600)
    config = TrainingConfig(**{**settings, "micro_batch_size": 4})
    alone = dataclasses.replace(world, parallel_dims=ParallelDims("none", 1, 1, ""))
    room = memory_estimate.estimate_memory(config, alone).nbytes + 1
    assert run_ranks(1, fit_small, settings, None, room) == [""]
    assert "micro_batch_size = auto: 4\nbatch_size 8 = micro_batch_size 4 x 1 ranks x 2" in capfd.readouterr().out


@pytest.mark.multiprocess
def test_out_of_memory_with_a_fixed_size_shows_what_is_held_and_what_helps(tmp_path: Path) -> None:
    fixed = settings_for(tmp_path, "fixed", parallel="ddp", micro_batch_size=4, vocab_size=600, context_len=64)
    with pytest.raises(AssertionError, match="rank 1 of 2 failed") as caught:
        run_ranks(2, fit, fixed, out_of_memory_at_two)
    text = str(caught.value)
    assert "OutOfMemoryError: injected\nestimated memory of one step on one rank" in text
    for line in ("master weights", "optimizer state", "at the peak (", "with micro_batch_size = 2"):
        assert line in text


def out_of_memory_at_two(trainer: Any) -> None:
    out_of_memory_above(2, rank=1)


@pytest.mark.multiprocess
def test_when_nothing_fits_every_rank_says_so(tmp_path: Path) -> None:
    auto = settings_for(tmp_path, "auto", parallel="fsdp", micro_batch_size="auto")
    errors = run_ranks(2, fit_small, auto, 0)
    assert all("micro_batch_size: not even 1 fits in memory\nestimated memory of one step" in error for error in errors)
