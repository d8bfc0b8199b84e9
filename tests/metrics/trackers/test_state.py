"""A tracker continues its run after a resume, and sends no step twice."""

from tinytrain_dist.metrics.trackers.base import TrackedRun
from tinytrain_dist.metrics.trackers.state import TrackerState


def run_in(folder, resumed_step=0, is_new=False):
    return TrackedRun("run", folder, folder, {}, "", resumed_step, is_new)


def test_a_resume_continues_after_the_last_step_of_each_group(tmp_path):
    first = TrackerState(run_in(tmp_path))
    assert first.id == ""
    first.begin("abc", "a server")
    for step in (5, 6, 7):
        assert first.unsent(step, {"train/loss": 1.0}) == {"train/loss": 1.0}
    first.unsent(6, {"eval/loss": 1.0})
    assert [first.next_row(), first.next_row()] == [0, 1]

    second = TrackerState(run_in(tmp_path, 5))
    assert (second.id, second.service) == ("abc", "a server")
    second.begin("abc", "a server")
    assert "has steps up to 7 already" in second.describe_repeated(run_in(tmp_path, 5), "X")
    assert second.unsent(7, {"train/loss": 2.0, "eval/loss": 2.0}) == {"eval/loss": 2.0}
    assert second.unsent(8, {"train/loss": 2.0}) == {"train/loss": 2.0}
    assert second.next_row() == 2
    assert TrackerState(run_in(tmp_path, 8)).describe_repeated(run_in(tmp_path, 8), "X") == ""


def test_another_run_begins_without_steps(tmp_path):
    first = TrackerState(run_in(tmp_path))
    first.begin("abc", "a server")
    first.unsent(7, {"train/loss": 1.0})
    assert TrackerState(run_in(tmp_path, is_new=True)).id == ""
    elsewhere = TrackerState(run_in(tmp_path))
    elsewhere.begin("abc", "another server")
    assert elsewhere.unsent(1, {"train/loss": 1.0})


def test_a_damaged_file_begins_a_new_run(tmp_path):
    for text in ("", "[1]", '{"id": 3, "last_steps": 4}', '{"id": "a", "last_steps": {"train": "x"}, "rows": "y"}'):
        (tmp_path / "run.json").write_text(text)
        state = TrackerState(run_in(tmp_path))
        assert state.unsent(1, {"train/loss": 1.0})
        assert state.next_row() == 0
