"""Check what a closed terminal, nohup and background jobs do to a run and to other long commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY, TORCHRUN
from tests.helpers.terminals import in_terminal
from tests.helpers.training import Run, config_file

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
ENDLESS = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "log_every": 5}
LOCAL = [REPOSITORY / "launch" / "local.sh"]
# as a shell starts a job in the background, and nohup a command
IN_BACKGROUND = ["sh", "-c", 'trap "" INT QUIT HUP; exec "$@"', "sh"]
PYTHON_FIRST = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # local.sh of a checkout without .venv


def last_step(output: str) -> int:
    return int(re.findall(r"step (\d+)/", output)[-1])


@pytest.mark.parametrize(
    ("launcher", "output_to_terminal"), [("local.sh", True), ("local.sh", False), ("torchrun", False)]
)
def test_a_closed_terminal_saves_and_ends_the_run(tmp_path: Path, launcher: str, output_to_terminal: bool) -> None:
    config = config_file(tmp_path, **ENDLESS)
    torchrun = [sys.executable, *TORCHRUN, "--standalone", "--nproc-per-node=2", REPOSITORY / "launch" / "train.py"]
    command = [*LOCAL, config, "--nproc", "2"] if launcher == "local.sh" else [*torchrun, config]
    log = tmp_path / "log"
    with in_terminal(command, tmp_path, log, PYTHON_FIRST, output_to_terminal=output_to_terminal) as terminal:
        terminal.wait_for_output("loss ")
        terminal.hang_up()
        exit_code = terminal.wait(60)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["state"], state["reason"]) == ("preempted", "SIGHUP"), terminal.output()
    assert Run(tmp_path / "run").checkpoint.name == f"checkpoint-{state['step']:08d}"
    if launcher == "local.sh":  # torchrun ends with a traceback of its own
        assert exit_code == 0
        assert "Traceback" not in terminal.output()


def test_signals_that_were_ignored_at_the_start_stay_ignored(tmp_path: Path) -> None:
    config = config_file(tmp_path, **ENDLESS)
    command = [*IN_BACKGROUND, *LOCAL, config, "--nproc", "2"]
    with in_terminal(command, tmp_path, tmp_path / "log", PYTHON_FIRST) as terminal:
        terminal.wait_for_output("step 5/")
        terminal.type(b"\x03\x1c")  # Ctrl-C and Ctrl-\
        terminal.hang_up()
        for pid in terminal.worker_pids():  # each leads a session, so the terminal reaches none of them
            os.kill(pid, signal.SIGHUP)
            os.kill(pid, signal.SIGINT)
        terminal.wait_for_output(f"step {5 * (last_step(terminal.output()) // 5 + 4)}/")  # it trains on
        os.kill(terminal.process.pid, signal.SIGTERM)
        assert terminal.wait(60) == 0, terminal.output()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["state"], state["reason"]) == ("preempted", "SIGTERM")


def test_ctrl_backslash_ends_at_once_and_the_state_is_written(tmp_path: Path) -> None:
    command = [*LOCAL, config_file(tmp_path, **ENDLESS), "--nproc", "1"]
    with in_terminal(command, tmp_path, tmp_path / "log", PYTHON_FIRST) as terminal:
        terminal.wait_for_output("step 5/")
        terminal.type(b"\x1c")
        assert terminal.wait(60) == 128 + signal.SIGKILL, terminal.output()
    assert terminal.output().rstrip().splitlines()[-1].startswith("error: ended by SIGQUIT, without saving, after step")
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "failed"


def test_a_closed_terminal_leaves_nothing_half_prepared(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    lines = "".join(f"{number} is a number, and its square is {number**2}\n" for number in range(20_000))
    for name in range(20):
        (tmp_path / "text" / f"{name}.txt").write_text(lines)
    command = [sys.executable, "-m", "tinytrain_dist", "prepare", "text", "--out", "out", "--workers", "2"]
    env = {"PYTHONPATH": str(REPOSITORY)}
    with in_terminal(command, tmp_path, tmp_path / "log", env) as terminal:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 1_000 for path in tmp_path.glob(".out.new-*/train.npy")):
            assert terminal.process.poll() is None, terminal.output()
            assert time.monotonic() < deadline, terminal.output()
            time.sleep(0.02)
        terminal.hang_up()
        assert terminal.wait(60) == 128 + signal.SIGHUP, terminal.output()
    assert "Traceback" not in terminal.output()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "text"]


FAKE_COMMAND = f"""#!{sys.executable}
import signal, sys
if sys.argv[0].endswith("local.sh"):
    waited_for = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    for number in waited_for:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: print("got", signal.Signals(number).name, flush=True) or sys.exit())
    print("trains", flush=True)
    while True:
        signal.pause()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_the_quickstart_passes_a_stop_request_on_and_waits(tmp_path: Path, name: str, code: int) -> None:
    checkout = tmp_path / "checkout"
    for command in ("launch/setup.sh", "launch/local.sh", ".venv/bin/tinytrain"):
        path = checkout / command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_COMMAND)
        path.chmod(0o755)
    script = checkout / "launch" / "quickstart.sh"
    (checkout / "tinytrain_dist" / "launch").mkdir(parents=True)
    for path in ("launch/quickstart.sh", "tinytrain_dist/launch/preamble.sh"):
        shutil.copy(REPOSITORY / path, checkout / path)
    with in_terminal(["bash", script], tmp_path, tmp_path / "log") as terminal:
        terminal.wait_for_output("trains")
        if name == "SIGHUP":
            terminal.hang_up()
        elif name == "SIGINT":
            terminal.type(b"\x03")
        else:
            os.kill(terminal.process.pid, signal.SIGTERM)
        assert terminal.wait(30) == code, terminal.output()
    assert f"got {name}" in terminal.output()
    assert "Stopped. The same command continues where it stopped." in terminal.output()
    assert "What the model writes" not in terminal.output()
