"""Check that the scripts in launch/ do not depend on settings of the user's shell, and that they show pip's errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.training import Run, config_file

pytestmark = pytest.mark.multiprocess
PLAIN = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PIP_", "PYTHON"))},
    "PYTHONPATH": str(REPOSITORY),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # local.sh of a checkout without .venv
}
SETTINGS = {
    "CDPATH": f"{REPOSITORY.parent}:/tmp:.",
    "SHELLOPTS": "noclobber:noglob:monitor",
    "BASHOPTS": "nocasematch:failglob:nullglob:xpg_echo",
    "BASH_FUNC_cd%%": '() { builtin cd "$@"; echo "now in $PWD"; }',
    "BASH_FUNC_dirname%%": "() { echo /; }",
    "POSIXLY_CORRECT": "1",
    "GREP_OPTIONS": "--color=always",
    "PYTHONHOME": "/nonexistent",
    "PYTHONINSPECT": "1",
    "TMPDIR": "/nonexistent/a b",
}
# In place of Python: it makes environments that contain itself, and writes down how pip is called.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"-m pip"*)
        echo "$* target=$PIP_TARGET user=$PIP_USER virtualenv=$PIP_REQUIRE_VIRTUALENV path=$PYTHONPATH" >>"$CALLS"
        case "$*" in *+cpu*) echo "ERROR: $PIP_SAYS" >&2 && exit 1 ;; esac
        ;;
    *launch/environment.py*)
        # the real script, which takes this program for the Python that runs it
        exec "$REAL_PYTHON" -c "import runpy, sys; sys.executable = '$0'; sys.argv = ['environment.py', *sys.argv[1:]]
runpy.run_path('$2', run_name='__main__')" "${@:3}"
        ;;
    *importlib*) exit 1 ;;
esac
exit 0
"""


def test_the_scripts_find_their_checkout_whatever_the_shell_is_told(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    links = tmp_path / "my scripts"
    links.mkdir()
    for arguments in (["local.sh", config, "--nproc", "1"], ["node.sh", config, "--nnodes", "1", "--node-rank", "0"]):
        script, *options = arguments
        (links / script).symlink_to(REPOSITORY / "launch" / script)
        outputs = []
        for path, env in [(f"launch/{script}", {}), (f"launch/{script}", SETTINGS), (links / script, SETTINGS)]:
            done = subprocess.run(
                [path, *options, "--dry-run"],
                env={**PLAIN, "OMP_NUM_THREADS": "1", **env},
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
        assert "tinytrain_dist.train" in outputs[0]
        assert outputs[1:] == outputs[:1] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_outputs_that_cannot_be_written_and_the_umask_do_not_end_a_run(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=3, ckpt_every=3)
    place = tmp_path / "a run"
    command = 'umask 0777; exec launch/local.sh "$0" --nproc 1 --target-dir "$1" <&- >&- 2>/dev/full'
    done = subprocess.run(["bash", "-c", command, config, place], env=PLAIN, cwd=REPOSITORY, check=False)
    assert done.returncode == 0
    for path in (place, Run(place).checkpoint, Run(place).checkpoint / "manifest.json"):
        assert path.stat().st_mode & 0o600 == 0o600, "the owner can use it"
    for output in ("2>/dev/full", "2>&-"):
        done = subprocess.run(["bash", "-c", f"launch/local.sh {output}"], env=PLAIN, cwd=REPOSITORY, check=False)
        assert done.returncode == 2


@pytest.mark.skipif(sys.platform != "linux", reason="there is a CPU build only for Linux")
@pytest.mark.parametrize(
    "error",
    ["No matching distribution found for torch", "ResolutionImpossible: for help visit", "No space left on device"],
)
def test_setup_ignores_settings_of_pip_and_shows_its_errors(tmp_path: Path, error: str) -> None:
    checkout = tmp_path / "a checkout"
    shutil.copytree(REPOSITORY / "launch", checkout / "launch")
    shutil.copytree(REPOSITORY / "tinytrain_dist" / "launch", checkout / "tinytrain_dist" / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, checkout / name)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".tinytrain-place").write_text("where the checkout was before\n")
    settings = {"PIP_TARGET": "/t", "PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PYTHONPATH": "/p"}
    done = subprocess.run(
        [checkout / "launch" / "setup.sh"],
        env={
            **PLAIN,
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "TORCH_BUILD": "cpu",
            **SETTINGS,
            **settings,
            "CALLS": str(tmp_path / "calls"),
            "PIP_SAYS": error,
            "REAL_PYTHON": sys.executable,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "calls").exists(), done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.endswith(" target= user=0 virtualenv= path=") for call in calls), calls
    assert f"ERROR: {error}" in done.stderr
    if "No space" not in error:
        assert (done.returncode, len(calls)) == (0, 4), done.stderr
        assert "no index offers the CPU build, see above" in done.stderr
    else:
        assert (done.returncode, len(calls)) == (1, 1), done.stderr
        assert "no index offers" not in done.stderr
        assert "correct the cause and run launch/setup.sh again" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_quickstart_goes_on_when_nothing_can_be_printed(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    shutil.copytree(REPOSITORY / "launch", checkout / "launch")
    shutil.copytree(REPOSITORY / "tinytrain_dist" / "launch", checkout / "tinytrain_dist" / "launch")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for script in ("launch/setup.sh", "launch/local.sh", ".venv/bin/tinytrain"):
        (checkout / script).write_text('#!/bin/sh\necho "$0" >>"$CALLS"\n')
        (checkout / script).chmod(0o755)
    (tmp_path / "link").symlink_to(checkout / "launch" / "quickstart.sh")
    for number, output in enumerate((">/dev/full", ">&-", "| true")):
        calls = tmp_path / f"calls-{number}"
        command = f"set -o pipefail; ./link {output}"
        env = {**PLAIN, **SETTINGS, "CALLS": str(calls)}
        # without SHELLOPTS: the outer shell is not what is tested
        env = {name: value for name, value in env.items() if name not in ("SHELLOPTS", "BASHOPTS")}
        done = subprocess.run(
            ["bash", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert len(calls.read_text().splitlines()) == 5, "setup, prepare, training, sample, plot"
