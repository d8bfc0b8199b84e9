"""The check before step 1 that all ranks agree: it names the rank that differs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import AGENT, launch_training, run_ranks
from tests.helpers.training import settings_for
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import init_distributed
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.reliability import rank_consistency


def check_consistency(settings: dict[str, Any], odd: str) -> str:
    """On a rank: run the check with something different on rank 2."""
    context = replace(init_distributed("cpu"), host=f"node{int(os.environ['RANK']) // 2 + 1}")
    if context.rank == 2:
        if odd == "settings":
            settings = {**settings, "lr_max": 0.5, "target_dir": "elsewhere"}
        elif odd == "code":
            rank_consistency.code_digest = lambda: "another"
        elif odd == "versions":
            torch.__version__ = "2.11.0"  # type: ignore[assignment]
        elif odd == "shape":
            context = replace(context, local_world_size=7)
        elif odd == "clock":
            real = rank_consistency.time.time
            rank_consistency.clock_offsets.__defaults__ = (lambda: real() - 100,)
    if odd == "threads":
        settings = {**settings, "cpu_threads": 4}
        rank_consistency.usable_cores = lambda: {0, 1} if context.rank < 2 else {0, 1, 2, 3, 4, 5, 6, 7}
    else:
        rank_consistency.usable_cores = lambda: {0, 1}
    try:
        return "\n".join(rank_consistency.check_rank_consistency(TrainingConfig(**settings), context))
    except ConfigError as error:
        return "\n".join([error.source, *error.problems])


REST = "rank 0 (node1), rank 1 (node1), rank 3 (node2)"
CODE = rank_consistency.code_digest()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("odd", "problems"),
    [
        ("nothing", ""),
        (
            "settings",
            "the comparison of 4 ranks\n"
            f"target_dir: 'elsewhere' on rank 2 (node2), but 'runs/default' on {REST}; "
            "give every node the same file and the same settings\n"
            f"lr_max: 0.5 on rank 2 (node2), but 0.001 on {REST}; give every node the same file and the same settings",
        ),
        ("code", f"code: 'another' on rank 2 (node2), but '{CODE}' on {REST}; start every node from"),
        ("versions", f"torch: '2.11.0' on rank 2 (node2), but {torch.__version__!r} on {REST}; use the same"),
        ("shape", f"processes per node: 7 on rank 2 (node2), but 4 on {REST}; start the same number"),
        ("clock", "clock: node2 is 100.0 s behind node1; synchronize them (chrony)"),
        ("threads", "threads: 2 process(es) on node1 run 8 threads on 2 core(s) and slow each other down; "
                    "set cpu_threads = 1, or give the job more cores (--cpus-per-task)"),
    ],
)  # fmt: skip
def test_a_rank_that_differs_is_named_on_all_ranks(odd: str, problems: str) -> None:
    for said in run_ranks(4, check_consistency, {"batch_size": 4}, odd):
        assert (problems in said) if problems else said == ""
        assert said.count("clock") == (odd == "clock")
        assert said.count("threads:") == (odd == "threads")


def test_with_two_ranks_the_value_of_rank_0_counts_as_usual() -> None:
    assert rank_consistency.find_differences([{"torch": 1}, {"torch": 2}], ["a", "b"]) == [
        "torch: 2 on rank 1 (b), but 1 on rank 0 (a); use the same environment on all nodes"
    ]


@pytest.mark.multiprocess
def test_run_with_different_settings_on_its_ranks_does_not_start(tmp_path: Path) -> None:
    script = tmp_path / "odd.py"
    script.write_text(
        "import os, sys\nfrom tinytrain_dist.launch.rank_program import main\n"
        "main([*sys.argv[1:], '--seed', os.environ['RANK']])\n"
    )
    settings = settings_for(tmp_path, "run")
    config = tmp_path / "run.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    done = launch_training([str(config)], 2, tmp_path, script=script, launcher=AGENT)
    assert done.returncode == 2
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("  seed: 1 on rank 1 (")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_many_ranks_are_counted_and_not_named() -> None:
    assert rank_consistency.format_ranks([0, 1, 2], list("abcde")) == "rank 0 (a), rank 1 (b), rank 2 (c)"
    assert rank_consistency.format_ranks([0, 1, 2, 4], list("abcde")).endswith("rank 2 (c) and 1 more")


def test_a_clock_is_wrong_only_beyond_the_error_of_the_measurement() -> None:
    offsets = [(0.0, 0.1), (3.0, 0.5), (3.0, 1.5), (-50.0, 0.5)]
    assert rank_consistency.skewed_clocks(offsets, ["a", "b", "c", "d"]) == [
        "clock: b is 3.0 s ahead of a; synchronize them (chrony)",
        "clock: d is 50.0 s behind a; synchronize them (chrony)",
    ]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({}, "set OMP_NUM_THREADS=2,"), ({"cpu_threads": 3}, "set cpu_threads = 2,")],
)
def test_the_setting_that_decides_the_threads_is_named(settings: dict[str, Any], remedy: str) -> None:
    config = TrainingConfig(**settings)
    (warning,) = rank_consistency.oversubscribed_hosts([3, 3], [{0, 1, 2, 3}] * 2, ["here"] * 2, config)
    assert remedy in warning


def test_a_reproducible_run_has_one_thread_whatever_torch_has_now() -> None:
    config = TrainingConfig(reproducible=True, micro_batch_size=1)
    assert rank_consistency.threads_of(config) == 1
    assert rank_consistency.threads_of(TrainingConfig()) == torch.get_num_threads() == rank_consistency.threads_of(None)
