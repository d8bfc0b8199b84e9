"""Build the documentation site in strict mode, and check that it is complete and loads nothing from other hosts."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tinytrain_dist

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CONFIGURATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def copy_pages(folder: Path) -> Path:
    """Copy what the site is built from. It is built beside its pages, so a test needs a copy."""
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site in `folder`; any warning is an error."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    done.stdout = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    return done


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site."""
    folder = copy_pages(tmp_path_factory.mktemp("site"))
    done = build(folder)
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout
    return folder / "site"


def html_of(site: Path, page: Path) -> Path:
    name = page.relative_to(ROOT / "docs").with_suffix("")
    return site / (name.parent if name.name == "README" else name) / "index.html"


def test_every_page_is_built(site: Path) -> None:
    assert [page.name for page in PAGES if not html_of(site, page).is_file()] == []


def test_every_guide_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", CONFIGURATION, re.MULTILINE)
    guides = [page.name for page in PAGES if page.parent == ROOT / "docs"]
    assert sorted(listed) == sorted([*guides, "decisions/README.md"])


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"', text)
        loaded += [tag for tag in re.findall(r"<link\b[^>]+>", text) if "stylesheet" in tag or "preconnect" in tag]
        assert not [link for link in loaded if "//" in link], path
        assert 'class="mermaid"' not in text, f"{path}: the script for such pictures comes from another host"


def test_no_list_has_run_into_a_paragraph(site: Path) -> None:
    """After a block that is not indented as the site's Markdown wants it, "3. " stands in the middle of a paragraph."""
    for path in site.rglob("*.html"):
        text = re.sub(r"<pre\b.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
            assert not re.search(r"^(\d+\.|[*-]) ", paragraph, re.MULTILINE), f"{path}: {paragraph}"


def test_a_broken_link_or_reference_fails_the_build(tmp_path: Path) -> None:
    page = copy_pages(tmp_path) / "docs" / "first_run.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text + "\n[a](nowhere.md), [b](resume.md#nowhere), [c][tinytrain_dist.nowhere]\n", encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "3 issues found" in done.stdout, done.stdout


def test_an_unknown_name_in_the_reference_fails_the_build(tmp_path: Path) -> None:
    page = copy_pages(tmp_path) / "docs" / "api.md"
    page.write_text("# API reference\n\n::: tinytrain_dist.nowhere\n", encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "tinytrain_dist.nowhere could not be found" in done.stdout, done.stdout


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: tinytrain_dist\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(tinytrain_dist.__all__)
    built = html_of(site, ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", built))
    for name in tinytrain_dist.__all__:
        assert f'id="tinytrain_dist.{name}"' in built
        description = (getattr(tinytrain_dist, name).__doc__ or "").splitlines()[0].split("`")[0].strip()
        assert description in text, f"the reference of {name} has no description"
