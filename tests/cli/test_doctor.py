"""`tinytrain doctor` on several ranks: healthy, slow, cut off, and with wrong arguments."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import AGENT, descendants, launch_training, run_ranks, training_process
from tests.helpers.training import settings_for
from tinytrain_dist.cli import doctor
from tinytrain_dist.cli.doctor_checks import network, speed
from tinytrain_dist.reliability import rank_consistency


def examine(args: list[str], slow_rank: int | None = None, broken: str = "") -> tuple[int, str]:
    """On a rank: run the doctor with short measurements, and with a slow device on one rank if the test asks for it."""
    import contextlib
    import io

    rank = int(os.environ["RANK"])
    speed.MIB = 1024
    rank_consistency.usable_cores = lambda: set(range(8))
    speed.matmul_rate = lambda *_: 3e9 if rank == slow_rank else 1e10  # type: ignore[assignment]
    speed.best_seconds = lambda action, *_: (action(), 1e-3)[1]  # type: ignore[assignment]
    if broken == "port" and rank == 0:
        network.try_peers = lambda host, _: [f"network: {host} cannot reach node2"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = doctor.main(args)
    return code, said.getvalue()


@pytest.mark.multiprocess
def test_healthy_ranks() -> None:
    (code, said), silent = run_ranks(2, examine, [])
    assert code == 0, said
    assert "PROBLEM" not in said
    assert said.rstrip().endswith("no problems found")
    assert "inside a node (2 ranks)" in said
    assert silent == (0, "")  # rank 0 reports for all ranks


@pytest.mark.multiprocess
def test_slow_rank_is_named() -> None:
    (code, said), (other, _), _ = run_ranks(3, examine, [], 2)
    assert (code, other) == (1, 1)
    name = f"rank 2 ({socket.gethostname()})"
    assert f"PROBLEM  matmul bf16: {name} has 0.003 TFLOP/s, the median of 3 is 0.01;" in said
    assert "rank 1 (" not in said
    assert said.rstrip().endswith("2 problems found")


@pytest.mark.multiprocess
def test_broken_network_ends_the_examination_before_a_collective_hangs() -> None:
    (code, said), (other, _) = run_ranks(2, examine, [], None, "port")
    assert (code, other) == (1, 1)
    assert "cannot reach node2" in said
    assert "matmul" not in said


@pytest.mark.multiprocess
def test_run_folder_and_data_of_the_configuration(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", micro_batch_size=2)
    args = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    code, said = run_ranks(2, examine, args)[0]
    assert code == 0, said
    assert f"{tmp_path}/run/checkpoints can be written, and all ranks see its files" in said
    assert "disk: room for 3 checkpoints" in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "train.npy").unlink()
    code, said = run_ranks(2, examine, args)[0]
    assert code == 1
    assert f"PROBLEM  train_data: there is no {tmp_path}/train.npy on {socket.gethostname()}" in said


@pytest.mark.multiprocess
def test_under_the_agent(tmp_path: Path) -> None:
    module = "tinytrain_dist.cli.doctor"
    done = launch_training(["--timeout", "60"], 2, tmp_path, script=module, torchrun_args=["-m"], launcher=AGENT)
    assert "on 2 ranks of" in done.stdout
    assert re.search(r"matmul bf16: .* TFLOP/s", done.stdout)
    assert done.returncode == (0 if "no problems found" in done.stdout else 1)  # a busy machine has a slow rank


@pytest.mark.multiprocess
def test_a_stop_signal_to_the_agent_ends_it_at_once_and_for_good(tmp_path: Path) -> None:
    def ranks() -> list[int]:
        found = []
        for pid in descendants(running.process.pid):
            with contextlib.suppress(ProcessLookupError):
                found += [pid] if os.getsid(pid) == pid else []
        return found

    options = {"torchrun_args": ["--max-restarts=1", "-m"], "launcher": AGENT}
    with training_process([], 2, tmp_path, script="tinytrain_dist.cli.doctor", **options) as running:
        while len(pids := ranks()) < 2:
            assert running.process.poll() is None, running.output()
            time.sleep(0.01)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 128 + signal.SIGTERM, running.output()
        assert running.output().splitlines()[-1] == "error: stopped by SIGTERM"
        assert "tinytrain doctor on" not in running.output(), "it had not ended by itself"
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.multiprocess
def test_a_mistake_on_the_command_line_is_reported_once_for_all_ranks(tmp_path: Path) -> None:
    module = "tinytrain_dist.cli.doctor"
    options = {"torchrun_args": ["--max-restarts=1", "-m"], "launcher": AGENT}
    done = launch_training(["--timeout", "0"], 2, tmp_path, script=module, **options)
    assert done.returncode == 2
    assert done.stdout.count("not greater than 0") == 1, done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "error: 1 problem in the arguments of `tinytrain doctor`",
        "  --timeout: 0 is not greater than 0; give the seconds to wait",
    ]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--nnodes", "2"], "only some of them are set; give all three"),
        (["--nnodes", "2", "--node-rank", "2", "--head", "a"], "--node-rank: 2 is not the number of a node; give 0 .."),
        (["--nodes", "2", "--node", "2", "--head", "a:1"], "--node-rank: 2 is not the number of a node; give 0 .. 1"),
        (["--nnodes", "2", "--node-rank", "1", "--head", "a:b"], "--head: 'b' is not a port; give HOST:PORT"),
        (["--timeout", "0"], "not greater than 0; give the seconds"),
        (["--lr-maxx", "1"], "did you mean lr_max"),
        (["no-such-file.toml"], "cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tinytrain_dist.cli.main import main

    try:
        code: Any = main(["doctor", *args])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert says in capsys.readouterr().err
