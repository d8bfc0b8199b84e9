"""Processes that have imported torch and wait to become ranks of an elastic run."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launching import free_port
from tests.helpers.ranks import REPOSITORY
from tests.helpers.run_log import records
from tests.helpers.training import config_file
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.launch import agent_state, hanging_starts, standby_pool
from tinytrain_dist.launch.standby_pool import StandbyPool
from tinytrain_dist.reliability import start_times
from tinytrain_dist.utils.processes import process_age

pytestmark = pytest.mark.multiprocess
RANK = (sys.executable, "-P", "-u", "-m", "tinytrain_dist.train")
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
TAKE_LONG = ("tinytrain_dist.", "torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "tyro")
READY_SECONDS = 120.0
LIST_NEW_MODULES = """
import importlib, os, sys
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.launch.standby_pool import imports_of
for module in imports_of(parse_command_line(sys.argv[1:])):
    importlib.import_module(module)
known, end = set(sys.modules), os._exit
def list_new_modules_and_end(code):
    with open("new-modules", "w") as file:
        file.write("\\n".join(set(sys.modules) - known))
    end(code)
os._exit = list_new_modules_and_end
from tinytrain_dist.launch.rank_program import main
main(sys.argv[1:])
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return {**os.environ, **ALONE, "MASTER_PORT": str(free_port())}


@pytest.fixture
def pool(tmp_path: Path, environment: dict[str, str]) -> Iterator[StandbyPool]:
    config = parse_command_line([config_file(tmp_path, parallel="fsdp", compile=False, total_steps=2)])
    made = StandbyPool(config)
    yield made
    made.close()
    assert agent_state.agent.standbys == set()


def test_a_standby_becomes_the_rank_that_it_is_told_to_be(
    tmp_path: Path, pool: StandbyPool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "7")  # what the standby inherits does not count
    monkeypatch.setenv("TINYTRAIN_STOP", "SIGTERM")
    pool.fill(2)
    first, second = (standby.process.pid for standby in pool._waiting)
    assert list(agent_state.rank_pids()) == [], "a standby is no rank"
    select.select([pool._waiting[0].connection], [], [], READY_SECONDS)  # it has imported everything
    os.kill(second, signal.SIGSTOP)
    age = process_age(first)

    config = str(tmp_path / "run.toml")
    assert pool.take(("/usr/bin/python3", *RANK[1:], config), environment) is None, "another interpreter"
    assert pool.take((sys.executable, "-m", "other_program"), environment) is None
    assert pool.take((*RANK, config), environment | {"OMP_NUM_THREADS": "2"}) is None, "torch has chosen its threads"
    monkeypatch.setattr(agent_state.agent, "called_up", {1: ["RANK=0"], 2: ["RANK=1"]})
    rank = pool.take((*RANK, config, "--total-steps", "3"), environment | {"ODD": "a\udcff\n", "LARGE": "x" * 100_000})
    assert rank is not None
    assert rank.pid == first
    assert hanging_starts._has_rank_0(first)
    assert list(agent_state.agent.called_up) == [2, first], "two ranks are on this node"
    assert not hanging_starts._has_rank_0(second)
    assert agent_state.agent.standbys == {second}
    assert rank.wait(READY_SECONDS) == 0
    log = records(tmp_path / "run" / "logs" / "metrics.jsonl")
    assert [record["step"] for record in log if record["kind"] == "train"] == [1, 2, 3]
    (start,) = [record["start_seconds"] for record in log if record["kind"] == "first_step"]
    assert start["imports"] < age, "the time in which it waited is not part of its start"


def test_a_standby_ends_when_its_agent_ends(pool: StandbyPool, capfd: pytest.CaptureFixture[str]) -> None:
    pool.fill(1)
    (standby,) = pool._waiting
    standby.connection.close()  # as when the agent is killed
    assert standby.process.wait(READY_SECONDS) == 0
    assert capfd.readouterr().err == ""


def test_without_a_standby_ranks_start_as_usual(
    tmp_path: Path, pool: StandbyPool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*RANK, str(tmp_path / "run.toml"))
    assert pool.take(command, environment) is None, "none was started"
    pool.fill(2)
    for standby in pool._waiting:
        standby.process.kill()
        standby.process.wait()
    pool.refill(ranks_train=True)
    assert len(pool._waiting) == 2, "more of them would die as well"
    assert pool.take(command, environment) is None


def test_new_standbys_leave_the_processors_to_ranks_that_start(
    pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    monkeypatch.setattr(pool, "fill", filled.append)
    pool._size, pool._taken_at = 2, time.monotonic()
    pool.refill(ranks_train=False)
    assert filled == []
    pool.refill(ranks_train=True)
    pool._taken_at -= 2 * standby_pool.START_SECONDS
    pool.refill(ranks_train=False)
    assert filled == [2, 2]


def test_a_standby_imports_all_that_takes_long(tmp_path: Path, environment: dict[str, str]) -> None:
    config = config_file(tmp_path, parallel="fsdp", compile=False, total_steps=2, trackers=["tensorboard"])
    (tmp_path / "rank.py").write_text(LIST_NEW_MODULES, encoding="utf-8")
    subprocess.run([sys.executable, "rank.py", config], cwd=tmp_path, env=environment, check=True)
    new = (tmp_path / "new-modules").read_text(encoding="utf-8").split()
    assert [name for name in new if name.startswith(TAKE_LONG)] == []


def test_what_a_standby_imports_is_what_the_run_needs(tmp_path: Path) -> None:
    def imported(**settings: object) -> set[str]:
        return set(standby_pool.imports_of(parse_command_line([config_file(tmp_path, **settings)])))

    assert not imported(parallel="ddp", compile=False) & {"torch._dynamo", "torch.distributed.fsdp"}
    assert imported(parallel="auto", compile=False) >= {"torch._dynamo", "torch.distributed.fsdp"}
    assert "torch._inductor.compile_fx" in imported(parallel="ddp", compile=True)


def test_a_rank_begins_when_it_is_called_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_times, "_called_up", [])
    before = time.monotonic()
    assert start_times.rank_start() < before
    start_times.begin_as_rank()
    assert start_times.rank_start() >= before
