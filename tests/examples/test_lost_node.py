"""lost_node.sh: a node of a run is killed and comes back; the run goes on, and ends with the bits of a quiet run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.programs import run_script
from tests.helpers.training import config_file
from tinytrain_dist.cli.main import main

pytestmark = pytest.mark.multiprocess


def test_a_lost_node_leaves_no_trace_in_the_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file(tmp_path, total_steps=100_000, eval_every=100_000, compile=False)
    done = run_script("lost_node.sh", [config], tmp_path, NODES="2", OMP_NUM_THREADS="1")
    logs = "\n".join(path.read_text() for path in (tmp_path / "runs/lost_node/logs").iterdir())
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert done.stdout.endswith("equal bits: the loss of a node left no trace\n")
    assert "Traceback" not in (tmp_path / "runs/lost_node/logs/store.log").read_text()

    run = tmp_path / "runs" / "lost_node" / "run"
    changes = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert [change["kind"] for change in changes] == ["lost", "recovered", "joined", "recovered"]
    lost, recovered, joined, _ = changes
    assert (lost["lost"], lost["nodes"], joined["joined"]) == (["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"])
    assert lost["reason"] == "node 127.0.0.1 was lost"
    assert list(recovered["recovery_seconds"]) == ["detection", "stop", "rendezvous", "start", "load", "first_step"]
    assert recovered["lost_seconds"] == pytest.approx(sum(recovered["recovery_seconds"].values()), abs=0.01)
    assert joined["step"] > lost["step"] - recovered["repeated_steps"]

    records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = [record["step"] for record in records if record["kind"] == "resumed"][-1:]
    assert resumed == joined["step"], "a planned change repeats no step"
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "node 127.0.0.1 was lost" in shown
    assert "node 127.0.0.1 joined" in shown
