"""What the worker copies, keeps, deletes and downloads, at a URL that is a folder."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.copies import Copies, files_below, flip_byte, write_checkpoint_folder
from tinytrain_dist.checkpoint.copies import remote_folder
from tinytrain_dist.checkpoint.copies.remote_folder import CopyError, RemoteFolder
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.errors import CheckpointError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "a disk" / "copies"


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[int, Path]:
    return {step: write_checkpoint_folder(tmp_path / "run", step) for step in (1, 2, 3, 4, 5)}


def complete(place: Path) -> list[int]:
    return sorted(int(path.parent.name[-8:]) for path in place.glob("*/manifest.json"))


class LostConnectionError(BaseException):
    """Ends an operation as a kill does: no handler of the worker sees it."""


def test_retention_keeps_the_newest_and_the_multiples(place: Path, checkpoints: dict[int, Path]) -> None:
    copies = Copies(place, keep_last=1, keep_every=2)
    assert copies.claim()["copies"] == {}
    for path in checkpoints.values():
        copies.copy(path)
    assert complete(place) == [2, 4, 5]
    assert sorted(path.name for path in place.glob("checkpoint-*")) == [f"checkpoint-0000000{n}" for n in (2, 4, 5)]
    for step in (2, 4, 5):
        assert find_damage(place / f"checkpoint-0000000{step}") == []


def test_what_is_no_copy_of_this_run_is_never_changed(place: Path, checkpoints: dict[int, Path]) -> None:
    shutil.copytree(checkpoints[1], place / "checkpoint-00000001")  # by hand: it has no copy.json
    for name in ("notes.txt", "checkpoint-00000003.damaged/x", "checkpoint-2/x", "state-00000001/manifest.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    before = files_below(place)
    copies = Copies(place)
    copies.claim()
    for step in (2, 3, 4):
        copies.copy(checkpoints[step])
        if step == 2:
            (place / "checkpoint-00000002" / "plot.png").write_text("mine")  # beside a copy of this run
    with pytest.raises(CheckpointError, match="this run has not copied"):
        copies.copy(checkpoints[1])
    after = files_below(place)
    assert {name: after.get(name) for name in before} == before
    assert complete(place) == [1, 1, 4]
    assert [name for name in after if name.startswith("checkpoint-00000002/")] == ["checkpoint-00000002/plot.png"]


def test_a_stop_at_any_moment_leaves_no_manifest_without_its_files(
    place: Path, checkpoints: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the n-th change of a file at the URL fail, for every n. Another start then completes the work."""
    changes = itertools.count()
    fail_at = -1

    def failing(original: Any) -> Any:
        def change(*args: Any, **named: Any) -> Any:
            if next(changes) == fail_at:
                raise LostConnectionError
            return original(*args, **named)

        return change

    for name in ("write", "send", "delete"):
        monkeypatch.setattr(RemoteFolder, name, failing(getattr(RemoteFolder, name)))
    for attempt in itertools.count():
        shutil.rmtree(place, ignore_errors=True)
        fail_at = -1
        first = Copies(place)
        first.claim()
        first.copy(checkpoints[1])
        changes, fail_at = itertools.count(), attempt
        try:
            first.copy(checkpoints[2])
            ended = True
        except LostConnectionError:
            ended = False
        assert complete(place), "one valid copy exists at every moment"
        for path in place.glob("*/manifest.json"):
            assert find_damage(path.parent) == []
        fail_at = -1
        again = Copies(place)
        again.claim("second")
        assert again.copy(checkpoints[2]) == ["checkpoint-00000002"]
        assert [path.name for path in place.glob("checkpoint-*")] == ["checkpoint-00000002"]
        if ended:
            break
    assert attempt > 5


def test_an_interrupted_copy_sends_only_what_is_missing(
    place: Path, checkpoints: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(place)
    copies.claim()
    copies.copy(checkpoints[1])
    folder = place / "checkpoint-00000001"
    (folder / "manifest.json").unlink()
    models = sorted(folder.glob("model-*"))
    models[0].unlink()
    flip_byte(models[1])
    sent = []
    original = RemoteFolder.send
    monkeypatch.setattr(
        RemoteFolder, "send", lambda self, path, *rest: (sent.append(path.name), original(self, path, *rest))[1]
    )
    copies.copy(checkpoints[1])
    assert sorted(sent) == [models[0].name, models[1].name]
    assert find_damage(folder) == []


def test_another_history_of_a_step_replaces_its_copy(place: Path, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    copies = Copies(place)
    copies.claim()
    copies.copy(checkpoints[3])
    again = write_checkpoint_folder(tmp_path / "again", 3, note="another history")
    copies.copy(again)
    assert "another history" in (place / "checkpoint-00000003" / "trainer_state.json").read_text()
    assert find_damage(place / "checkpoint-00000003") == []


def test_copies_newer_than_the_run_are_set_aside_once_there_is_another(
    place: Path, checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    copies = Copies(place, keep_last=2)
    copies.claim()
    copies.copy(checkpoints[2])
    copies.copy(checkpoints[5])
    assert copies.copy(checkpoints[3]) == ["checkpoint-00000002", "checkpoint-00000003"]
    assert (place / "checkpoint-00000005" / "manifest.json.set-aside").exists()
    assert "newer than the run" in copies.notes[-1]
    copies = Copies(place, keep_last=2)
    assert copies.claim("next")["copies"].keys() == {"checkpoint-00000002", "checkpoint-00000003"}
    assert copies.fetch(tmp_path / "new").name == "checkpoint-00000003"  # type: ignore[union-attr]
    copies.copy(checkpoints[5])  # saved again
    assert complete(place) == [3, 5]


def test_a_damaged_checkpoint_is_not_copied(place: Path, checkpoints: dict[int, Path]) -> None:
    copies = Copies(place)
    copies.claim()
    copies.copy(checkpoints[1])
    flip_byte(sorted(checkpoints[2].glob("model-*"))[-1])
    with pytest.raises(CheckpointError, match="is damaged, so it is not copied"):
        copies.copy(checkpoints[2])
    assert complete(place) == [1]


def test_only_one_run_and_its_newest_start_copy_to_a_url(place: Path, checkpoints: dict[int, Path]) -> None:
    first = Copies(place)
    run = first.claim("first")["run"]
    for adopt, known in (("runs/b", None), (None, None), (None, "another"), ("any", "another")):
        with pytest.raises(CopyError, match="copies of another run, with target_dir runs/a") as caught:
            Copies(place).claim("other", known, adopt)
        assert caught.value.concerns == "run"
    first.copy(checkpoints[1])
    assert Copies(place).claim("again", run, None)["run"] == run
    with pytest.raises(CopyError, match="holds 1 copies of this run, but resume = never"):
        Copies(place).claim("new", run, None, is_new=True)
    assert Copies(place).claim("moved", adopt="any")["run"] == run
    second = Copies(place)
    assert second.claim("second")["run"] == run
    with pytest.raises(CopyError, match="another start \\(start second\\) copies to") as caught:
        first.copy(checkpoints[2])
    assert caught.value.concerns == "run"
    assert second.copy(checkpoints[2]) == ["checkpoint-00000002"]


def test_a_download_takes_the_newest_intact_copy_and_resumes(
    place: Path, checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, into = Copies(place, keep_last=5), tmp_path / "new"
    copies.claim()
    assert copies.fetch(into) is None
    for path in checkpoints.values():
        copies.copy(path)
    (place / "checkpoint-00000005" / "manifest.json").unlink()  # as during an upload
    flip_byte(sorted((place / "checkpoint-00000004").glob("model-*"))[-1])
    (place / "checkpoint-00000003" / "trainer_state.json").write_text("{}")
    read: list[str] = []
    fails = True
    original = RemoteFolder.blocks

    def blocks(self: RemoteFolder, name: str, block_bytes: int) -> Any:
        read.append(name)
        if fails and name.startswith("checkpoint-00000002/trainer"):
            raise LostConnectionError
        return original(self, name, block_bytes)

    monkeypatch.setattr(RemoteFolder, "blocks", blocks)
    with pytest.raises(LostConnectionError):
        copies.fetch(into)
    assert [path.name for path in into.iterdir()] == ["checkpoint-00000002.download"]
    fails = False
    read.clear()
    again = Copies(place)
    again.claim("again")
    path = again.fetch(into)
    assert path == into / "checkpoint-00000002"
    assert files_below(path) == files_below(checkpoints[2])
    assert [path.name for path in into.iterdir()] == ["checkpoint-00000002"]
    assert [name for name in read if "00000002" in name] == ["checkpoint-00000002/trainer_state.json"]
    assert len(again.notes) == 2
    assert "checkpoint-00000004/model-" in again.notes[0]
    assert "differs from what was written" in again.notes[0]
    assert "trainer_state.json: has 2 bytes" in again.notes[1]

    for name in ("checkpoint-00000001", "checkpoint-00000002"):
        flip_byte(place / name / "manifest.json")
    with pytest.raises(CheckpointError, match=r"none of the 4 copies at .* is valid"):
        again.fetch(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_a_file_that_arrived_otherwise_is_found_without_a_checksum(
    place: Path, checkpoints: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder gives no checksum, so the ends and the middle are read back."""
    monkeypatch.setattr(remote_folder, "READ_BACK_BYTES", 8)
    copies = Copies(place)
    copies.claim()
    original = RemoteFolder.send

    def send(self: RemoteFolder, path: Path, name: str, *rest: Any) -> Any:
        sent = original(self, path, name, *rest)
        if path.name.startswith("model-00001"):
            flip_byte(place / name)
        return sent

    monkeypatch.setattr(RemoteFolder, "send", send)
    with pytest.raises(CopyError, match="holds other bytes than were sent") as caught:
        copies.copy(checkpoints[1])
    assert caught.value.may_pass
    assert complete(place) == []


def test_the_marker_is_json_with_the_run(place: Path) -> None:
    run = Copies(place).claim()["run"]
    found = json.loads((place / "tinytrain_copies.json").read_text())
    assert (found["run"], found["target_dir"], found["format"]) == (run, "runs/a", 1)
