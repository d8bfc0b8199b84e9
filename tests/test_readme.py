"""Owns that the README is true where it names files, commands, settings and tools."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tinytrain_dist import __all__ as public_names
from tinytrain_dist.cli import TOOLS
from tinytrain_dist.config import FIELDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line
]
OF_OTHERS = {  # flags of programs that are not ours
    "torchrun": {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_id", "rdzv_endpoint"},
    "sbatch": {"nodes", "gpus_per_node", "cpus_per_task", "time"},
    "launch/local.sh": {"nproc"},
}


def tree() -> list[str]:
    block = README.split("## Files")[1].split("```")[1]
    folder, paths = "", []
    for line in block.splitlines():
        if match := re.match(r"( *)(\S+)  ", line):
            indent, name = match.groups()
            if not indent:
                folder = name if name.endswith("/") else ""
            paths.append(folder + name if indent else name)
    return paths


def test_every_file_of_the_tree_exists() -> None:
    assert len(tree()) > 30
    missing = [path for path in tree() if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]
    assert not missing, f"the README names {missing}; correct its tree"


def test_every_module_is_in_the_tree() -> None:
    modules = {f"tinytrain_dist/{path.name}" for path in (ROOT / "tinytrain_dist").glob("*.py")}
    modules |= {f"launch/{path.name}" for path in (ROOT / "launch").iterdir() if path.is_file()}
    assert modules - set(tree()) == {"tinytrain_dist/__init__.py"}, "add a line for each file to the README's tree"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_commands_name_files_settings_and_tools_that_exist(command: list[str]) -> None:
    program = command[0]
    if program.startswith(".venv/bin/tinytrain"):
        assert command[1] in TOOLS, f"the README uses tinytrain {command[1]}"
        return
    for word in command:
        if re.match(r"(launch|configs|slurm)/", word):
            assert (ROOT / word).is_file(), f"the README uses {word}"
    names = {word.lstrip("-").split("=")[0].replace("-", "_") for word in command if word.startswith("--")}
    unknown = names - FIELDS.keys() - OF_OTHERS.get(program, set())
    assert not unknown, f"the README uses {unknown} with {program}"


def test_names_in_the_text_exist() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for name in re.findall(r"`--([a-z-]+)`", text):
        assert name == "help" or name.replace("-", "_") in FIELDS, name
    for verb in re.findall(r"`tinytrain ([a-z]+)", text):
        assert verb in TOOLS, verb
    for name in ("apply_ddp", "apply_fsdp", "clip_gradients", "get_batch", "save_checkpoint", "load_checkpoint"):
        assert f"`{name}`" in text
        assert name in public_names
    order = re.search(r"Read it in this order: (.*?)\.\n", text, re.DOTALL)
    assert order
    for module in re.findall(r"`([a-z]+)`", order.group(1)):
        assert (ROOT / "tinytrain_dist" / f"{module}.py").is_file(), module


def test_the_picture_exists() -> None:
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
