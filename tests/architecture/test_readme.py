"""Check the README: its file tree, links and public names. test_docs.py checks the commands of all pages."""

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


def test_every_path_of_the_tree_exists() -> None:
    assert len(tree()) > 20
    missing = [path for path in tree() if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]
    assert not missing, f"the README names {missing}; correct its tree"


def test_every_package_and_every_script_is_in_the_tree() -> None:
    packages = {f"tinytrain_dist/{path.parent.name}/" for path in (ROOT / "tinytrain_dist").glob("*/__init__.py")}
    scripts = {f"launch/{path.name}" for path in (ROOT / "launch").iterdir() if path.is_file()}
    assert packages | scripts <= set(tree()), "add a line for each package and script to the README's tree"


def test_packages_are_listed_in_reading_order() -> None:
    """From settings and model up to the commands; utils is last, because it is only looked up."""
    listed = [path.removeprefix("tinytrain_dist/").rstrip("/") for path in tree() if path.startswith("tinytrain_dist/")]
    order = "config model data optim distributed parallel metrics reliability checkpoint training launch cli utils"
    assert [name for name in listed if name] == order.split()


def test_public_names_in_the_text_exist() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for name in ("apply_ddp", "apply_fsdp", "clip_gradients", "get_batch", "save_checkpoint", "load_checkpoint"):
        assert f"`{name}`" in text
        assert name in public_names


def test_it_fits_on_a_page() -> None:
    assert len(README.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"the README links {target}, which does not exist"


def test_the_pictures_exist() -> None:
    """README.md and dashboards.md each show a PNG picture."""
    for page in (ROOT / "README.md", ROOT / "docs" / "dashboards.md"):
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8"))
        assert pictures, f"{page.name} has no picture"
        for picture in pictures:
            assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")
