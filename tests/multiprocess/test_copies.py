"""Copies of checkpoints on a real S3 server: connections that break, kills, a store that blocks, refuses or is away."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.copies import files_below, status_of
from tests.helpers.ranks import AGENT, living_processes, run_ranks, training_process
from tests.helpers.s3_server import BreakingProxy, S3Server, breaking_proxy, s3_server
from tests.helpers.training import Run, config_file, fit, settings_for
from tinytrain_dist.checkpoint.copies import copier
from tinytrain_dist.cli import main
from tinytrain_dist.utils.json_files import read_json_dict

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.multiprocess

SECRET = "the-secret-key"
REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture(autouse=True)
def _access(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, without those of this machine."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[BreakingProxy]:
    with breaking_proxy(server.port, most_bytes=1 << 60) as started:
        monkeypatch.setenv("AWS_ENDPOINT_URL", started.endpoint)
        yield started


def is_upload_of(name: str, data: bytes) -> bool:
    return data.startswith(b"PUT ") and name.encode() in data.partition(b"\r\n")[0]


def copied_steps(server: S3Server, prefix: str) -> list[int]:
    return [int(key.split("/")[-2][-8:]) for key in server.keys(prefix) if key.endswith("/manifest.json")]


def same_as_the_copy(server: S3Server, prefix: str, checkpoint: Path) -> bool:
    return all(server.get(f"{prefix}/{checkpoint.name}/{n}") == data for n, data in files_below(checkpoint).items())


def test_a_kill_in_an_upload_and_a_lost_run_folder_cost_no_bits(
    server: S3Server, proxy: BreakingProxy, tmp_path: Path, undisturbed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill rank 0 in an upload; start again over connections that break; lose the run folder; lose a copy as well."""
    folder, prefix = tmp_path / "run", "killed"
    settings = settings_for(tmp_path, "run", **RUN, checkpoint_copies=f"s3://bucket/{prefix}", copies_keep_last=3)
    workers: list[int] = []

    def kill(data: bytes) -> bytes | None:
        if is_upload_of("/optimizer-", data) and workers:
            return b""
        if is_upload_of("/optimizer-", data):
            pid = read_json_dict(folder / "lock.json")["pid"]
            workers.extend(child for child, parent in living_processes() if parent == pid)
            os.kill(pid, signal.SIGKILL)
            return b""
        return None

    proxy.on_request = kill
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(2, fit, {**settings, "stop_at_step": 4})
    assert workers
    wait_until(lambda: not set(workers) & {pid for pid, _ in living_processes()}, "the process that copies ends too")
    assert any("/model-" in key for key in server.keys(prefix))
    assert copied_steps(server, prefix) == []

    cuts: list[bytes] = []

    def cut(data: bytes) -> bytes | None:
        if data.startswith(b"PUT ") and len(cuts) < 4:
            cuts.append(data)
            return b""
        return None

    proxy.on_request = cut
    run_ranks(2, fit, {**settings, "stop_at_step": 6})
    proxy.on_request = lambda data: None
    assert len(cuts) == 4
    assert copied_steps(server, prefix)[-1] == 6
    assert same_as_the_copy(server, prefix, Run(folder).checkpoint)
    assert {"copied"} <= {record["kind"] for record in Run(folder).records}
    assert status_of(folder)["copied"][-1] == "checkpoint-00000006"

    shutil.rmtree(folder)
    key = next(key for key in server.keys(f"{prefix}/checkpoint-00000006") if "/optimizer-" in key)
    server.store(key, server.get(key)[:-1] + b"?")
    proxy.most_bytes, proxy.left = 30_000, 4  # some of the larger files do not arrive in one piece
    capsys.readouterr()
    run_ranks(1, fit, settings)
    assert proxy.broken >= 2
    run = Run(folder)
    (text,) = run.values("resumed", "text")
    downloaded = f"which was downloaded from s3://bucket/{prefix}/checkpoint-00000004"
    assert downloaded in text
    assert "damaged copy, skipped: s3://bucket/killed/checkpoint-00000006/optimizer-" in capsys.readouterr().out
    assert run.digests() == undisturbed.digests()
    assert copied_steps(server, prefix) == [4, 6, 8]
    assert same_as_the_copy(server, prefix, run.checkpoint)
    assert main.main(["verify", f"s3://bucket/{prefix}"]) == 0
    assert main.main(["ls", str(folder)]) == 0
    assert "copied" in capsys.readouterr().out


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_training_does_not_wait_for_a_store_that_blocks(server: S3Server, proxy: BreakingProxy, tmp_path: Path) -> None:
    """The first upload blocks until the run has ended. It is done, and the next start copies what is missing."""
    release = threading.Event()

    def block(data: bytes) -> bytes | None:
        if is_upload_of("/model-", data):
            (tmp_path / "held").touch()  # the ranks are other processes
            release.wait(LIMIT_SECONDS)
        return None

    proxy.on_request = block
    url = "s3://bucket/blocks"
    settings = {"ckpt_every": 1, "keep_last": 1, "checkpoint_copies": url, "copies_keep_every": 2}
    settings = settings_for(tmp_path, "run", **settings, copies_end_limit=0.0)
    (result,) = run_ranks(1, fit_after_hold, settings)
    assert result["state"] == "done"
    folder = tmp_path / "run"
    steps = [int(path.name[-8:]) for path in sorted((folder / "checkpoints").glob("checkpoint-????????"))]
    assert len(steps) <= 4, "the one that is copied, two multiples that wait, and keep_last"
    assert {1, 6} <= set(steps), "what is being copied is not deleted"
    assert copied_steps(server, "blocks") == []
    release.set()
    run_ranks(1, fit, {**settings, "total_steps": 7, "copies_end_limit": LIMIT_SECONDS})
    assert copied_steps(server, "blocks")[-2:] == [6, 7]


def fit_after_hold(settings: dict[str, Any]) -> dict[str, Any]:
    """Train; after the first save, wait until its upload has begun."""

    def wait_for_upload(trainer: Any) -> None:
        original = trainer.run_step

        def run_step() -> Any:
            if trainer.step == 2:
                trainer.saver.collect(trainer.step, wait=True)
                wait_until((Path(settings["target_dir"]).parent / "held").exists, "the upload begins")
            return original()

        trainer.run_step = run_step

    return fit(settings, wait_for_upload)


def test_refused_copies_cost_no_step_and_tell_no_secret(
    server: S3Server, proxy: BreakingProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.on_request = lambda data: REFUSED if is_upload_of("/model-", data) else None
    folder = tmp_path / "run"
    settings = settings_for(tmp_path, "run", ckpt_every=3, checkpoint_copies="s3://bucket/refused")
    (result,) = run_ranks(1, fit_until_three_failures, settings)
    assert result["state"] == "done"
    run = Run(folder)
    texts = run.values("copy_failed", "text")
    assert len(texts) == 1, "a warning for all failures of a quarter of an hour"
    assert "access was refused" in texts[0]
    assert "training continues, and it is tried again" in texts[0]
    assert copied_steps(server, "refused") == []
    assert SECRET.encode() not in b"".join(files_below(folder).values())
    assert main.main(["status", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "FAILING: s3://bucket/refused/checkpoint-0000000" in out
    assert SECRET not in out

    proxy.on_request = lambda data: REFUSED
    run_ranks(1, fit, {**settings, "total_steps": 7, "copies_end_limit": 0.0})  # it has checkpoints: only a warning
    assert "access was refused" in capsys.readouterr().out
    refusals = [({**settings, "target_dir": str(tmp_path / "new")}, "access was refused.*does not begin at step 0")]
    for refused, message in refusals:
        with pytest.raises(AssertionError, match=message):
            run_ranks(1, fit, refused)
    proxy.on_request = lambda data: None
    run_ranks(1, fit, {**settings, "total_steps": 7})
    assert copied_steps(server, "refused") == [6, 7]
    for place, message in {
        "s3://bucket/refused": "copies of another run, with target_dir .*/run, and",
        "s3://nowhere/refused": "no such file or folder",
    }.items():
        with pytest.raises(AssertionError, match=message):
            run_ranks(1, fit, {**settings, "target_dir": str(tmp_path / "new"), "checkpoint_copies": place})
    again = {**settings, "target_dir": str(tmp_path / "new"), "resume": "s3://bucket/refused/checkpoint-00000006"}
    run_ranks(1, fit, {**again, "checkpoint_copies": None, "total_steps": 7})
    assert Run(tmp_path / "new").digests() == run_digests(folder)
    assert (
        "downloaded from s3://bucket/refused/checkpoint-00000006" in Run(tmp_path / "new").values("resumed", "text")[0]
    )


def fit_until_three_failures(settings: dict[str, Any]) -> dict[str, Any]:
    """Train; after the first save, wait until its copy has failed three times."""
    copier.FIRST_RETRY_SECONDS = 0.01

    def wait_for_failures(trainer: Any) -> None:
        original = trainer.run_step

        def run_step() -> Any:
            if trainer.step == 4:
                trainer.saver.collect(trainer.step, wait=True)
                wait_until(lambda: status_of(Path(settings["target_dir"]))["failures"] >= 3, "it is tried again")
            return original()

        trainer.run_step = run_step

    return fit(settings, wait_for_failures)


def run_digests(folder: Path) -> dict[str, str]:
    return Run(folder).digests()


def test_a_store_that_is_away_stops_only_a_start_that_could_lose_work(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with breaking_proxy(9, most_bytes=0) as away:
        monkeypatch.setenv("AWS_ENDPOINT_URL", away.endpoint)
    settings = settings_for(tmp_path, "run", checkpoint_copies="s3://bucket/away", val_data=None)
    with pytest.raises(AssertionError, match=r"cannot be reached.*does not begin at step 0; set resume = never"):
        run_ranks(1, fit, settings)
    run_ranks(1, fit, {**settings, "resume": "never"})
    assert "the run starts, and copies are made when that works again" in capsys.readouterr().out
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    run_ranks(1, fit, {**settings, "total_steps": 7})
    assert copied_steps(server, "away") == [6, 7]


def test_a_second_ctrl_c_ends_the_wait_for_the_last_copy(
    server: S3Server, proxy: BreakingProxy, tmp_path: Path
) -> None:
    """The first one saves and stops the run. All is saved then, so the second one is no failure."""
    held, release = threading.Event(), threading.Event()

    def block(data: bytes) -> bytes | None:
        if is_upload_of("/model-", data):
            held.set()
            release.wait(LIMIT_SECONDS)
        return None

    proxy.on_request = block
    url = "s3://bucket/wait"
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=5, eval_every=100_000, checkpoint_copies=url)
    with training_process([config], 1, tmp_path, launcher=AGENT) as running:
        assert held.wait(LIMIT_SECONDS), running.output()
        running.process.send_signal(signal.SIGINT)
        running.wait_for_output("Ctrl-C ends the wait")
        running.process.send_signal(signal.SIGINT)
        assert running.wait(LIMIT_SECONDS) == 0, running.output()
        assert "ending; everything is saved" in running.output()
        assert "the last checkpoint was not copied; the next start of this run copies it" in running.output()
    release.set()
    assert read_json_dict(tmp_path / "run" / "state.json")["state"] == "preempted"
    assert not (tmp_path / "run" / "error.json").exists()
