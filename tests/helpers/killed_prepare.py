"""Kill `prepare` in the middle of its work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.ranks import REPOSITORY

_KILLED = """
import json, os, signal, sys
from tests.helpers.prepared_text import run_prepare
from tinytrain_dist.data.preparation import encoding, output_folder, token_writer
encoding._BATCH_BYTES = 500
left = int(sys.argv[1])
commit = output_folder.WorkFolder.commit

def commit_and_count(self, progress):
    global left
    commit(self, progress)
    left -= 1

append = token_writer.TokenWriter.append

def die_or_append(self, part):
    append(self, part)
    if left <= 0 and self.side == "val":
        os.kill(os.getpid(), signal.SIGKILL)  # after a part of the next shard was written

output_folder.WorkFolder.commit = commit_and_count
token_writer.TokenWriter.append = die_or_append
if __name__ == "__main__":
    run_prepare(tuple(sys.argv[4:]), sys.argv[2], **json.loads(sys.argv[3]))
"""


def kill_after(commits: int, out: Path, sources: tuple[str, ...], **options: Any) -> None:
    """Start to prepare, and kill the process in the middle of the shard after so many commits."""
    command = [sys.executable, "-c", _KILLED, str(commits), str(out), json.dumps(options), *sources]
    killed = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert killed.returncode == -signal.SIGKILL
