"""The wheel in an environment and a folder of its own: every command of a first run works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.multiprocess
TINY = "--total-steps 6 --ckpt-every 3 --eval-every 3 --eval-steps 1 --batch-size 4 --micro-batch-size 2 --d-model 32"
TINY += " --num-layers 2 --num-heads 2 --context-len 32 --log-every 2 --warmup-iters 2"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel. Dependencies come from the environment of the tests, and the checkout does not."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes into the folder that it builds
    files = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(files, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # a line in a .pth file adds a folder, and does not read the .pth files in it: the checkout stays out
    Path(paths.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


def run(environment: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with an environment in which only the wheel has our package."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLURM_"))}
    return subprocess.run(
        command,
        env={**clean, "PATH": f"{environment / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_first_run_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    def tinytrain(line: str, folder: Path = tmp_path) -> str:
        done = run(installed, folder, "tinytrain", *line.split())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    where = run(installed, tmp_path, "python", "-c", "import tinytrain_dist; print(tinytrain_dist.__file__)").stdout
    assert where.startswith(str(installed)), "not the checkout"
    assert tinytrain("--version").startswith("tinytrain_dist ")
    tinytrain("new mine")
    mine = tmp_path / "mine"
    (mine / "text.txt").write_text(
        "\n\n".join(path.read_text() for path in sorted(Path(REPOSITORY, "docs").glob("*.md")))
    )
    tinytrain("prepare text.txt --out data/stdlib --vocab-size 300 --workers 1", mine)
    trained = tinytrain(f"train config.toml --nproc 2 {TINY}", mine)
    assert "2 process(es)" in trained
    assert "done" in tinytrain("status runs/quickstart", mine)
    assert "ok " in tinytrain("verify runs/quickstart", mine)
    assert tinytrain("sample runs/quickstart --prompt The --max-new-tokens 5", mine).startswith("The")
    assert "perplexity" in tinytrain("evaluate runs/quickstart --data text.txt", mine)
    tinytrain("export runs/quickstart exported --no-check", mine)
    assert list((mine / "exported").glob("model*.safetensors"))
    assert tinytrain("config config.toml --changed", mine)
    submitted = tinytrain("submit config.toml --processes-per-node 2 --time 30 --dry-run", mine)
    assert "#SBATCH --time=30" in submitted
    # the same program, started by torchrun itself
    torchrun = [
        "torchrun",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc_per_node=1",
        "-m",
        "tinytrain_dist.train",
    ]
    resumed = run(installed, mine, "python", "-m", "torch.distributed.run", *torchrun[1:], "config.toml", *TINY.split())
    assert resumed.returncode == 0, resumed.stderr
    assert "nothing to do" in resumed.stdout + resumed.stderr or "6" in resumed.stdout


def test_what_is_missing_is_a_sentence(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "tinytrain", "train", "nope.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no file nope.toml" in done.stderr
    assert "Traceback" not in done.stderr
