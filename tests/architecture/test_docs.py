"""Owns that the guides and the README are true: commands, settings, tools and links exist, and the program runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import AGENT
from tinytrain_dist.cli.main import VERBS
from tinytrain_dist.config.schema import FIELDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS: dict[str, set[str]] = {  # flags of programs that are not ours
    "torchrun": {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_id", "rdzv_endpoint", "standalone"},
    "sbatch": {"nodes", "gpus_per_node", "cpus_per_task", "time", "array"},
    "launch/local.sh": {"nproc"},
    "launch/test.sh": {"fast"},
    "tensorboard": {"logdir"},
}
OF_LAUNCHERS = {"help", "max-restarts", "max-requeues", "node-rank"}
HELP = {"tinytrain", "launch/submit.py", "launch/node.sh"}  # programs that are asked what flags they know


def commands_of(text: str) -> list[list[str]]:
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page.name, words) for page in PAGES for words in commands_of(page.read_text(encoding="utf-8"))]


def flags_by_help(program: list[str]) -> set[str]:
    """The flags that a program's --help names."""
    start = [sys.executable] if program[0].endswith(".py") else []
    done = subprocess.run([*start, *program, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z0-9-_]*)", done.stdout)}


def test_there_are_commands() -> None:
    assert len({page for page, _ in COMMANDS}) >= 9
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page} {shlex.join(words)[:60]}" for page, words in COMMANDS]
)
def test_commands_name_files_settings_and_tools_that_exist(page: str, words: list[str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    known = set(FIELDS) | OF_OTHERS.get(program, set())
    if program == "tinytrain":
        assert words[1] in VERBS, f"{page} uses tinytrain {words[1]}"
        known |= flags_by_help([sys.executable, "-m", "tinytrain_dist", words[1]])
    elif program in HELP:
        known |= flags_by_help([program])
    for word in words:
        if re.match(r"(launch|configs|slurm)/", word):
            assert (ROOT / word).is_file(), f"{page} uses {word}"
    names = {flag.replace("-", "_") for word in words for flag in re.findall(r"^--([a-z][\w-]*)", word)}
    assert not names - known, f"{page} uses {names - known} with {program}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`--([a-z-]+)`", prose):
        assert name in OF_LAUNCHERS or name.replace("-", "_") in FIELDS, f"{page.name} names --{name}"
    for verb in re.findall(r"`tinytrain ([a-z]+)", prose):
        assert verb in VERBS, f"{page.name} names tinytrain {verb}"
    for name in re.findall(r"`([a-z]+/[a-z_.]+\.(?:py|sh|sbatch|toml|md))`", prose):
        # pages on the code name files of the package, such as config/schema.py
        found = any((folder / name).exists() for folder in (ROOT, ROOT / "tinytrain_dist"))
        assert found or name == "slurm/env.sh", f"{page.name} names {name}"


def test_every_guide_is_in_the_list() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in PAGES} - {"README.md"}


@pytest.mark.multiprocess
def test_the_program_for_people_with_their_own_loop_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "own.py").write_text(program, encoding="utf-8")
    command = [sys.executable, *AGENT, "--standalone", "--nproc_per_node", "2", "own.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"rank \d: loss (\S+), 3 tensors", done.stdout)
    assert len(losses) == 2
    assert all(float(loss) < 3.0 for loss in losses), losses
