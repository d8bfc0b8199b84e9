"""What wandb keeps offline, one run over a resume, and that wandb leaves the process as it was."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.run_log import GROUPS, WORK, config_in, values
from tests.helpers.trackers import OfflineRun
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.trackers import background

wandb = pytest.importorskip("wandb", exc_type=ImportError)


@pytest.fixture(autouse=True)
def without_account(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for status in background.FINISH_SECONDS:
        monkeypatch.setitem(background.FINISH_SECONDS, status, 600.0)
    wandb.teardown()  # else it keeps the settings of the environment of an earlier test


def with_wandb(folder: Path, **settings):
    return dataclasses.replace(config_in(folder), trackers=("wandb",), **settings)


def offline(folder: Path) -> OfflineRun:
    return OfflineRun(folder / "logs" / "wandb")


def test_without_a_key_the_run_is_kept_offline_and_the_process_as_it_was(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "another")
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = (sys.exit, sys.excepthook, [signal.getsignal(number) for number in stops])
    log = RunLog(with_wandb(tmp_path, lr_max=0.0125), True, 0)
    log.wait_for_trackers()
    log.about(0, "environment", "python 3")
    for step in (1, 2):
        log.train(step, values(step / 4), GROUPS, WORK)
    log.train(3, values(math.nan), GROUPS, WORK)
    log.evaluation(2, 0.5, 1.0)
    log.samples(2, [("def f(", "x):\n    pass")])
    log.event(2, "saved", "a folder")
    log.close()
    assert (sys.exit, sys.excepthook, [signal.getsignal(number) for number in stops]) == before
    found = offline(tmp_path)
    assert (found.projects[0], found.exit_codes) == ("another", [0])
    assert found.config["lr_max"] == 0.0125
    assert found.config["about/environment"] == "python 3"
    assert [step for step, _ in found.points("train/loss")] == [1, 2, 3]
    assert found.points("train/loss")[:2] == [(1, 0.25), (2, 0.5)]
    assert found.points("eval/loss") == [(2, 0.5)]
    assert found.points("events/saved") == [(2, 3)]
    assert found.points("event_texts/saved") == [(2, "a folder")]
    assert found.points("grad_norm_by_layer/layers.0")[0] == (1, 0.5)
    assert found.summary["status"] == "finished"
    (table,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/files/media/table/samples*.json")
    assert '[2,"def f(","x):\\n    pass"]' in table.read_text()
    out, err = capfd.readouterr()
    (line,) = [line for line in out.splitlines() if not line.startswith("step ")]
    assert line.startswith("tracker wandb: there is no API key, see `wandb login`, so the run is kept offline")
    assert line.endswith(f"wandb sync {tmp_path}/logs/wandb/offline-run-*-{found.ids[0]}")
    assert err == ""


def test_a_resume_continues_the_run_and_shows_no_step_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = RunLog(with_wandb(tmp_path), True, 0)
    for step in range(1, 8):
        first.train(step, values(float(step)), GROUPS, WORK)
    first.evaluation(4, 40.0, 1.0)
    first.close("stopped")
    second = RunLog(with_wandb(tmp_path, lr_max=0.5), True, 4)
    second.wait_for_trackers()
    for step in range(5, 10):
        second.train(step, values(step + 0.5), GROUPS, WORK)
    second.evaluation(6, 60.0, 1.0)
    second.close("failed")
    found = offline(tmp_path)
    assert len(found.ids) == 1
    assert found.exit_codes == [0, 1]
    expected = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5, 9.5]
    assert found.points("train/loss") == list(enumerate(expected, 1))
    assert found.points("eval/loss") == [(4, 40.0), (6, 60.0)]
    assert [row["_step"] for row in found.rows] == list(range(len(found.rows))), "the rows of both processes"
    assert found.config["lr_max"] == 0.5
    assert found.summary["status"] == "failed"
    out = capsys.readouterr().out
    assert "tracker wandb: WANDB_MODE is offline, so" in out
    assert "W&B has steps up to 7 already and keeps their first values" in out
    third = RunLog(with_wandb(tmp_path, resume="never"), True, 0)
    third.close()
    assert len(set(offline(tmp_path).ids)) == 2


def test_a_service_that_cannot_be_reached_keeps_the_run_offline(tmp_path, capsys, monkeypatch):
    from tinytrain_dist.metrics.trackers import wandb as tracker

    monkeypatch.setattr(tracker, "INIT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    log = RunLog(with_wandb(tmp_path), True, 0)
    log.train(1, values(0.5), GROUPS, WORK)
    log.close()
    assert "tracker wandb: the service cannot be used (" in capsys.readouterr().out
    assert offline(tmp_path).points("train/loss") == [(1, 0.5)]


def test_wandb_can_be_disabled(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = RunLog(with_wandb(tmp_path), True, 0)
    log.train(1, values(0.5), GROUPS, WORK)
    log.event(1, "saved", "x")
    log.samples(1, [("a", "b")])
    log.close()
    out = capsys.readouterr().out
    assert "tracker wandb: WANDB_MODE is disabled, so nothing is sent" in out
    assert "WARNING" not in out
    assert offline(tmp_path).ids == []


def test_on_a_terminal_nothing_is_asked(tmp_path):
    """With a terminal, wandb.init asks for a key; the tracker must not. `script` gives the program a terminal."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.metrics.trackers.test_wandb import *\n"
        f"assert sys.stdin.isatty()\nlog = RunLog(with_wandb(Path({str(tmp_path)!r})), True, 0)\n"
        "log.train(1, values(0.5), GROUPS, WORK)\nlog.close()\nprint('ended')"
    )
    parent, child = os.openpty()
    with open(tmp_path / "out", "wb") as out:
        command = [sys.executable, "-c", program]
        subprocess.run(command, stdin=child, stdout=out, stderr=out, check=False, timeout=600, cwd=os.getcwd())
    os.close(parent)
    os.close(child)
    text = (tmp_path / "out").read_text()
    assert text.splitlines()[-1] == "ended", text
    assert "there is no API key" in text
