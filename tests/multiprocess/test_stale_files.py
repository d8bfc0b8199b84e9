"""A process that is killed leaves temporary files; the next one at that place removes them and says so.

One process imports everything and forks a child for each kill. The child ends itself by SIGKILL before its n-th rename,
link or removal of a file, for n = 1, 2, ... until it ends by itself. So every step at which something can be left is
tried, in the same order on every machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.training import config_file
from tinytrain_dist.utils.stale_files import PATTERNS

pytestmark = pytest.mark.multiprocess

KILLS = """
import json, os, re, signal, sys, traceback
import torch, safetensors
from tinytrain_dist.cli import export, plot, prepare
from tinytrain_dist.launch import rank_program
from tinytrain_dist.training import build

place, command = sys.argv[1], sys.argv[2:]
main = {"train": rank_program.main, "prepare": prepare.main, "export": export.main, "plot": plot.main}[command[0]]

def child(number):
    count = 0
    def kill_at(event, args):
        nonlocal count
        if event in ("os.rename", "os.link", "os.remove", "os.rmdir") and str(args[0]).startswith(place):
            owned_by = re.search(r"\\.(\\d+)\\.\\w+", os.path.basename(args[0]))
            if owned_by and int(owned_by[1]) != os.getpid():
                return  # what an earlier process has left; otherwise the count would depend on how much that is
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(kill_at)
    code = 1
    try:
        code = main(command[1:]) or 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)

for number in range(1, 100):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(number)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    names = [os.path.relpath(os.path.join(folder, name), place)
             for folder, folders, files in os.walk(place) for name in folders + files]
    print("AFTER", json.dumps([code, names]), flush=True)
    if code != -signal.SIGKILL:
        break
"""


def kill_everywhere(place: Path, *command: str) -> tuple[set[str], str]:
    """Kill a command at every step until it succeeds; return the names that kills have left, and all output.

    Fails if anything is left at the end.
    """
    ended = subprocess.run(
        [sys.executable, "-c", KILLS, str(place), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    seen = [json.loads(line.removeprefix("AFTER ")) for line in ended.stdout.splitlines() if line.startswith("AFTER ")]
    assert seen[-1][0] == 0, ended.stdout
    assert len(seen) > 1, "nothing was killed"
    leftovers = [{name for name in names if is_temporary(name)} for _, names in seen]
    assert leftovers[-1] == set(), "the run that was not killed has removed what the others left"
    return set.union(*leftovers), ended.stdout


def is_temporary(name: str) -> bool:
    """Whether a path has the name of a temporary file, of this version or of an earlier one."""
    own = Path(name).name
    return any(pattern.fullmatch(own) for pattern in PATTERNS) or bool(
        re.search(r"\.tmp$|\.new-|^\..*\.old$|^lock-|^\.probe|\.now$", own)
    )


def kinds(names: set[str]) -> set[str]:
    """The names without the owner, which differs from run to run."""
    return {re.sub(r"[\w~-]+\.\d+\.\w+\.tmp$", "*.tmp", Path(name).name) for name in names}


def test_a_second_start_of_training_leaves_nothing_of_the_killed_ones(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=2, ckpt_every=1, eval_every=2, keep_last=1, num_layers=1)
    left, output = kill_everywhere(tmp_path, "train", config)
    seen = kinds(left)
    assert {"state.json.*.tmp", "rank-00000.json.*.tmp", "environment.json.*.tmp", "checkpoint-00000001.tmp"} <= seen
    assert any(Path(name).name.startswith(".probe-") for name in left)
    assert any(Path(name).name.startswith("lock-") for name in left)
    assert "removed what killed processes had left: " in output


def test_prepare_export_and_plot_leave_nothing_of_the_killed_ones(tmp_path: Path, text_runs: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"the line {number} of {number % 7}" for number in range(400)))
    prepare = ("prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "data"), "--vocab-size", "300")
    prepare += ("--split-by", "line", "--workers", "1")
    left, output = kill_everywhere(tmp_path, *prepare)
    assert any(name.startswith(".data.new-") for name in left)
    assert "removed what killed processes had left: " in output
    left, _ = kill_everywhere(tmp_path, *prepare, "--overwrite")
    assert ".data.old" in left

    run = str(text_runs / "one")
    left, output = kill_everywhere(tmp_path, "export", run, str(tmp_path / "out"), "--no-check")
    assert "out.*.tmp" in kinds(left)
    assert "removed what killed processes had left: " in output
    left, _ = kill_everywhere(tmp_path, "plot", run, "--out", str(tmp_path / "loss.png"))
    assert "loss.png.*.tmp" in kinds(left)
