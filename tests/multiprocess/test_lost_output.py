"""Runs whose output cannot be written, or whose machine has a name that nothing resolves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.training import config_file

AGENT = "-m tinytrain_dist.agent --standalone --nproc-per-node 2"
PROGRAM = f"{REPOSITORY}/launch/train.py"


def can_rename_the_machine() -> bool:
    """Return whether this process may run a command under another host name, as in a container."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--uts", "hostname", "pod-x"], capture_output=True, check=False).returncode == 0


@pytest.mark.multiprocess
def test_runs_depend_on_no_output_and_no_name_service(tmp_path: Path) -> None:
    unknown_name = can_rename_the_machine()
    rename = ["unshare", "--uts", "sh", "-c", 'hostname pod-x; exec "$0" "$@"'] if unknown_name else []
    reader, writer = os.pipe()
    os.close(reader)
    # Each program, and what the shell does with its streams, which otherwise are the pipe. The runs go side by side.
    cases = {
        "a full disk": (f"{AGENT} {PROGRAM}", ">/dev/full 2>/dev/full"),
        "a reader that has gone": (PROGRAM, ""),
        "closed streams": (PROGRAM, "<&- >&- 2>&-"),
    }
    processes = {}
    for name, (program, redirections) in cases.items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        command = f'exec "$0" {program} "$1" {redirections}'
        processes[name] = subprocess.Popen(
            [*rename, "sh", "-c", command, sys.executable, config_file(folder)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"},
            stdout=writer,
            stderr=writer,
        )
    os.close(writer)
    exit_codes = {name: process.wait(300) for name, process in processes.items()}
    assert exit_codes == dict.fromkeys(cases, 0)
    for name in cases:
        run = tmp_path / name.replace(" ", "_") / "run"
        assert json.loads((run / "state.json").read_text())["state"] == "done"
        hosts = {rank["host"] for rank in json.loads((run / "environment.json").read_text())["ranks"]}
        assert hosts == {"pod-x" if unknown_name else socket.gethostname()}
        assert (run / "checkpoints" / "checkpoint-00000006").is_dir()
        records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
        assert sum(record["kind"] == "train" for record in records) == 6
        lost = [record["text"] for record in records if record["kind"] == "output_lost"]
        if name == "closed streams":  # nothing is lost: nobody wanted it
            assert lost == []
        else:
            assert len(lost) in (1, 2), "once for each stream"
            assert all("what cannot be written there is dropped" in text for text in lost)
