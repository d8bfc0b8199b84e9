"""Check state.json, and which process may write it."""

import json

from tinytrain_dist.reliability import run_state


def test_the_state_is_written_whole_and_over_the_last_one(tmp_path, monkeypatch):
    monkeypatch.delenv("TINYTRAIN_ATTEMPT", raising=False)
    run_state.write_state(tmp_path, "running", None)
    run_state.write_state(tmp_path, "preempted", 7)
    assert json.loads((tmp_path / "state.json").read_text()) == {"state": "preempted", "step": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_state_names_the_attempt_and_where_it_began(tmp_path, monkeypatch):
    def written(state, step, reason=""):
        run_state.write_state(tmp_path, state, step, reason)
        return json.loads((tmp_path / "state.json").read_text())

    monkeypatch.setenv("TINYTRAIN_ATTEMPT", "3.0")
    assert written("running", 4) == {"state": "running", "step": 4, "attempt": "3.0", "first_step": 4}
    assert written("running", 6)["first_step"] == 4, "a restart in place goes on with the attempt"
    assert written("preempted", 9, "SIGTERM") == {
        "state": "preempted", "step": 9, "reason": "SIGTERM", "attempt": "3.0", "first_step": 4
    }  # fmt: skip
    monkeypatch.setenv("TINYTRAIN_ATTEMPT", "3.1")
    assert written("running", 9)["first_step"] == 9
    (tmp_path / "state.json").write_text("[]")
    assert written("failed", None) == {"state": "failed", "step": None, "attempt": "3.1", "first_step": None}


def test_a_run_that_another_process_has_taken_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "_claimed_runs", {})
    taken = []
    assert not run_state.owns_run(tmp_path)
    assert not run_state.lost_run(tmp_path)
    run_state.claim_run(tmp_path, lambda: bool(taken))
    assert run_state.owns_run(tmp_path)
    assert not run_state.lost_run(tmp_path)
    taken.append(1)
    assert not run_state.owns_run(tmp_path)
    assert run_state.lost_run(tmp_path)
