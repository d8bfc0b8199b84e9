"""`tinytrain plan`: the verdict, the remedy, and the errors of a run that cannot start."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tinytrain_dist.cli.main import main as tinytrain
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--vocab-size", "512", "--num-layers", "1", "--d-model", "64", "--num-heads", "2", "--d-ff", "64")


def run_plan(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = tinytrain(["plan", *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_fits_the_hardware_it_names(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes, per_node, device = {
        "chat_finetune": (1, 1, "rtx4090"),
        "gpt2_124m_ddp": (1, 8, "a100-40gb"),
        "llama_350m_fsdp": (1, 8, "rtx4090"),
        "llama_1b_hsdp": (4, 8, "a100-40gb"),
        "long_context": (1, 4, "cpu"),
        "quickstart": (1, 2, "cpu"),
        "speedrun_cpu": (1, 2, "cpu"),
        "tinystories": (1, 1, "h100"),
    }[config.stem]
    where = ("--nodes", str(nodes), "--devices-per-node", str(per_node), "--device", device)
    code, text = run_plan(capsys, str(config), *where, "--vocab-size", "32000")
    assert code == 0, text
    assert "\nFITS" in text
    assert "tokens per day" in text


def test_if_a_run_does_not_fit_settings_that_fit_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    args = (str(ROOT / "configs/llama_1b_hsdp.toml"), "--nodes", "1", "--devices-per-node", "8", "--device", "rtx4090")
    big = ("--vocab-size", "32000", "--micro-batch-size", "16", "--activation-checkpointing", "none")
    code, text = run_plan(capsys, *args, *big)
    assert code == 1, text
    assert "DOES NOT FIT in memory; it fits with " in text
    name, value = text.split("; it fits with ")[1].split(":")[0].split(" = ")
    again, text = run_plan(capsys, *args, *big, f"--{name}", value)
    assert again == 0, text


def test_a_plan_has_the_defaults_of_the_planned_device(capsys: pytest.CaptureFixture[str]) -> None:
    config = (str(ROOT / "configs/tinystories.toml"), *SMALL, "--parallel", "none")
    for device, settings, peak in (
        ("h100", (), "989"),
        ("h100-pcie", (), "756"),
        ("H100", ("--precision", "fp32"), "494"),
        ("h100", ("--precision", "fp32", "--reproducible", "true", "--micro-batch-size", "8"), "67"),
    ):
        _, text = run_plan(capsys, *config, "--device", device, *settings)
        assert f"50% of {peak} TFLOP/s" in text
    # one pass over this batch does not fit, so the size is chosen as in a run on a GPU
    large = ("--d-model", "2048", "--num-heads", "16", "--batch-size", "2048", "--device", "l4")
    code, text = run_plan(capsys, *config, *large)
    assert code == 0, text
    assert "batch_size 2048 = micro_batch_size " in text
    assert "micro_batch_size 2048 " not in text


def test_growing_batches_are_named_and_their_tokens_counted(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--batch-size", "32", "--total-steps", "100", "--context-len", "10", "--micro-batch-size", "4", *SMALL)
    growing = (*settings, "--batch-size-warmup", "0: 8", "30: 16", "60: 32", "--device", "cpu")
    code, text = run_plan(capsys, *growing)
    assert code == 0, text
    assert "\nbatch_size_warmup: 8 from step 0 on, 16 from step 30 on, 32 from step 60 on\n" in text
    assert f"100 steps = {10 * (30 * 8 + 30 * 16 + 40 * 32):.3g} tokens" in text
    _, constant = run_plan(capsys, *settings, "--device", "cpu")
    memory_and_step = [printed.partition("memory of")[2].partition("least time")[0] for printed in (text, constant)]
    assert memory_and_step[0] == memory_and_step[1] != ""
    code, text = run_plan(capsys, *growing, "--devices-per-node", "4")
    assert code == 2
    assert "8 from step 0 on / micro_batch_size 4 = 2 micro-batches are fewer than 4 ranks, and each rank" in text


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_an_uneven_share_is_named_with_what_it_wastes(capsys: pytest.CaptureFixture[str], mode: str) -> None:
    settings = ("--batch-size", "32", "--context-len", "10", "--micro-batch-size", "4", "--parallel", mode, *SMALL)
    code, text = run_plan(capsys, *settings, "--reproducible", "true", "--device", "cpu", "--devices-per-node", "3")
    assert code == 0, text
    uneven = "uneven shares: 2 of 3 ranks compute 3 micro-batches, the others 2, so 11% of the ranks' time is unused"
    assert f"batch_size 32 = micro_batch_size 4 x 8 micro-batches; 320 tokens per step\n{uneven}\n" in text


def test_epochs_give_the_length_of_the_planned_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.zeros(1000 * 32 + 1, np.uint16))
    small = (*SMALL, "--context-len", "32", "--batch-size", "8", "--sampling", "shuffle")
    data = ("--train-data", str(tmp_path / "train.npy"))
    code, by_epochs = run_plan(capsys, *small, *data, "--epochs", "2")
    assert code == 0, by_epochs
    assert by_epochs == run_plan(capsys, *small, *data, "--total-steps", "251")[1]  # 2 x 1,001 windows / 8
    assert "; 251 steps = " in by_epochs
    code, text = run_plan(capsys, *small, "--train-data", str(tmp_path / "none.npy"), "--epochs", "2")
    assert code == 2
    assert "epochs: total_steps follows from the token files of train_data, which cannot be read here (" in text


def test_the_simulated_step_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        str(ROOT / "configs/llama_1b_hsdp.toml"),
        "--vocab-size",
        "32000",
        "--nodes",
        "2",
        "--devices-per-node",
        "8",
    )
    code, text = run_plan(capsys, *args, "--batch-size", "128")
    assert code == 0, text
    parts = r"simulated step: (\S+) ms = (\S+) ms forward and backward \+ (\S+) ms update \+ (\S+) ms waiting for"
    found = re.search(parts, text)
    assert found is not None, text
    total, *terms = (float(number) for number in found.groups())
    assert total == pytest.approx(sum(terms), rel=0.01)
    assert re.search(r"hsdp 2 x 8 \(this run\) .* ms$", text, re.MULTILINE), "its row has the time of waiting"
    # neither a CPU nor reproducible mode is simulated
    small = (str(ROOT / "configs/quickstart.toml"), *SMALL, "--devices-per-node", "2")
    _, on_cpu = run_plan(capsys, *small, "--device", "cpu")
    _, exact = run_plan(capsys, *small, "--reproducible", "true", "--micro-batch-size", "8")
    assert "simulated" not in on_cpu + exact


def test_a_table_compares_the_modes_on_numbers_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    config = (str(ROOT / "configs/quickstart.toml"), *SMALL, "--parallel", "fsdp", "--reshard-after-forward", "true")
    code, text = run_plan(capsys, *config, "--gpus", "2", "16", "--batch-per-gpu", "8")
    assert code == 0, text
    rows = [line.split() for line in text.splitlines() if line.endswith("ms")]
    assert [row[:2] for row in rows] == [
        ["2", "ddp"],
        ["2", "fsdp"],
        *(["16", mode] for mode in ("ddp", "fsdp", "hsdp")),
    ]
    assert all(row[2:5] == ["1", "x", "8"] for row in rows)
    assert "computed, not measured: 50% of the peak, 80% of 450 GB/s inside a node and of 400 GB/s between" in text
    # the batch of the configuration, 16 sequences, is not enough for 32 GPUs
    code, text = run_plan(capsys, *config, "--gpus", "32", "--micro-batch-size", "1", "--network", "100")
    assert code == 1, text
    assert text.count("batch_size: 16 / micro_batch_size 1 = 16 micro-batches are fewer than 32 ranks") == 3
    assert "12.5 GB/s between nodes" in text


LONG = (*SMALL, "--num-heads", "4", "--num-layers", "3", "--d-model", "256", "--batch-size", "4")
LONG = (str(ROOT / "configs/quickstart.toml"), *LONG)


def test_a_table_shows_on_how_many_gpus_contexts_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """A million tokens of a small model, whose activations are the memory that it needs."""
    code, text = run_plan(capsys, *LONG, "--device", "l4", "--devices-per-node", "2", "--contexts", "8k", "1m")
    assert code == 0, text
    rows = [line.split() for line in text.splitlines() if re.match(r" *[0-9,]+ +[0-9]+ +[0-9]+ ", line)]
    assert [row[:3] for row in rows[:2]] == [["8,192", "1", "1"], ["8,192", "2", "1"]], text
    assert [row[:2] for row in rows[2:]] == [["1,048,576", "1"], ["1,048,576", "2"]], text
    assert rows[0][3] == "none"
    assert rows[0][-1].endswith("%")
    assert rows[2][3].startswith("block"), text
    assert rows[3][2] == "2", text
    assert len(rows[3]) > len(rows[2]), "the exchange has a size and times"
    # on a number of GPUs that is too small
    code, text = run_plan(capsys, *LONG, "--device", "l4", "--contexts", "16m", "--gpus", "1")
    assert code == 1
    assert re.search(r"16,777,216 +1  does not fit: .* GiB on the device and .* with cp 1, block, offload", text), text


def test_the_exchange_and_the_host_are_part_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--cp", "2", "--activation-checkpointing", "block", "--activation-offload", "true")
    settings = (*settings, "--parallel", "hsdp", "--micro-batch-size", "1")
    where = ("--devices-per-node", "4", "--context-len", "32768", "--host-memory", "64")
    code, text = run_plan(capsys, *LONG, *settings, *where)
    assert code == 0, text
    found = re.search(r"exchange of the 2 ranks of each sequence, which are on one node: .* in (\S+) (ms|s) ", text)
    assert found is not None, text
    across = re.search(r"if they were on two nodes, it would take (\S+) (ms|s)\n", text)
    assert across is not None, text
    assert float(across[1]) > float(found[1])
    assert " to the host and back\n" in text
    # two inputs of 16,384 x 256 numbers in bf16, on four GPUs
    host = r"memory of the host for 4 GPU\(s\).*:\n  needed +0\.062 GiB\n  available +54\.836 GiB\n"
    assert re.search(host, text), text


def test_the_help_names_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_plan(capsys, "--help")
    text = capsys.readouterr().out
    assert all(name in text for name in DEVICE_SPECS)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--device", "h10"), "device: 'h10' is unknown; the nearest names are h100"),
        (("--nodes", "0"), "--nodes: 0 must be at least 1"),
        (("--gpus", "8", "12"), "--gpus: 12 is not a multiple of 8 GPUs on each node; leave it out, or set --devices"),
        (("--gpus", "0"), "--gpus: 0 must be at least 1"),
        (("--gpus", "8", "--nodes", "2"), "--nodes: has no effect with --gpus"),
        (("--gpus", "8", "--device", "cpu"), "--gpus: the step is not simulated with --device cpu"),
        (("--gpus", "8", "--reproducible", "true"), "--gpus: the step is not simulated with reproducible = true"),
        (("--batch-per-gpu", "8"), "--batch-per-gpu: has no effect without --gpus; set --batch-size instead"),
        (("--contexts", "8k", "1g"), "--contexts: '1g' is no number of tokens; give one such as 8192, 8k or 1m"),
        (("--contexts", "8k,32k"), "--contexts: '8k,32k' has a comma; give numbers such as 8192, 8k or 1m, with sp"),
        (("--contexts",), "--contexts: needs at least one value; give some, as in --contexts 8k 1m, or leave it out"),
        (("--gpus",), "--gpus: needs at least one value; give some, as in --gpus 8 64, or leave it out"),
        (("--gpus", "8,16"), "--gpus: got '8,16'; give numbers, with spaces between them"),
        (("--contexts", "8k", "--cp", "3"), "cp: has no effect with --contexts, which chooses it; leave it out"),
        (("--context-len", str(2**53), "--total-steps", "60"), "context_len: 9007199254740992 is too large to be sim"),
        (("--contexts", "8k", "--nodes", "2"), "--nodes: has no effect with --contexts"),
        (
            ("--contexts", "8k", "--batch-per-gpu", "1"),
            "--batch-per-gpu: has no effect with --contexts; set --batch-si",
        ),
        (("--contexts", "8k", "--device", "cpu"), "--contexts: the step is not simulated with --device cpu"),
        (
            ("--cp", "4", "--num-heads", "4", "--devices-per-node", "2"),
            "cp: 4 does not divide the 2 process(es) of a node; possible: cp 1, 2, or a multiple of 4 processes on",
        ),
        (("--devices-per-node", "three"), "--devices-per-node: got 'three'; give a number"),
        (("--devices-per-node", "3"), "batch_size: 16 / micro_batch_size 8 = 2 micro-batches are fewer than 3 ranks"),
        (("--devices-per-node", "4", "--parallel", "none"), "parallel: none runs on 1 process, but there are 4"),
        (("--micro-batch-siz", "4"), "micro_batch_siz: unknown setting; did you mean micro_batch_size?"),
    ],
)
def test_what_cannot_run_is_refused_with_the_error_of_a_run(
    args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_plan(capsys, str(ROOT / "configs/quickstart.toml"), "--vocab-size", "4096", *args)
    assert code == 2
    assert sentence in text


def test_contexts_that_cannot_be_planned_are_refused_before_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    batch = ("--batch-size", "512", "--context-len", "4096", "--num-heads", "3", "--d-model", "48")
    scaled = ("--rope-type", "dynamic", "--rope-scaling-factor", "2", "--rope-original-context-len", "1024")
    config = (str(ROOT / "configs/long_context.toml"), "--vocab-size", "512", "--num-kv-heads", "3")
    contexts = ("--contexts", "8k", "999999999999m", "511", "1024")
    code, text = run_plan(capsys, *config, *batch, *scaled, *contexts)
    assert code == 2
    head, *problems = text.splitlines()
    assert head == "error: 3 problems in the settings of plan", text
    assert problems[0].endswith("--contexts: 1048575999998951424 is too large to be simulated; give at most 16777216")
    # a step has 2,097,152 tokens, and 4,096 sequences are simulated
    assert "--contexts: 511 makes 4104 sequences of the 2097152 tokens of a step" in problems[1]
    assert problems[1].endswith("give at least 512, or set a smaller --batch-size")
    assert problems[2].strip().startswith("--contexts: 1024 is not possible: rope_type: dynamic has no effect while")


def test_a_step_with_too_many_micro_steps_has_no_simulated_time(capsys: pytest.CaptureFixture[str]) -> None:
    many = (str(ROOT / "configs/quickstart.toml"), *SMALL, "--batch-size", "1048576", "--micro-batch-size", "1")
    code, text = run_plan(capsys, *many)
    assert code == 0, text
    assert "simulated" not in text
    code, text = run_plan(capsys, *many, "--gpus", "2")
    assert code == 1
    assert text.count("524288 micro-steps of a GPU are too many to be simulated") == 2, text


def test_the_vocabulary_must_be_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = ("--train-data", str(tmp_path / "train.npy"))
    code, text = run_plan(capsys, str(ROOT / "configs/quickstart.toml"), *data)
    assert code == 2
    assert "train.npy: no such token file" in text
    (tmp_path / "train.npy").touch()
    code, text = run_plan(capsys, str(ROOT / "configs/quickstart.toml"), *data)
    assert code == 2
    assert "vocab_size: not set, and there is no" in text
