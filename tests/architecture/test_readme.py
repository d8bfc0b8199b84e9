"""Owns that the README's tree, reading order and public names are true; test_docs.py checks commands of all pages."""

from __future__ import annotations

import re
from pathlib import Path

from tinytrain_dist import __all__ as public_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_public_names_in_the_text_exist() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for name in ("apply_ddp", "apply_fsdp", "clip_gradients", "get_batch", "save_checkpoint", "load_checkpoint"):
        assert f"`{name}`" in text
        assert name in public_names
    order = re.search(r"Read it in this order: (.*?)\.\n", text, re.DOTALL)
    assert order
    for module in re.findall(r"`([a-z]+)`", order.group(1)):
        assert (ROOT / "tinytrain_dist" / f"{module}.py").is_file(), module


def test_the_picture_exists() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
