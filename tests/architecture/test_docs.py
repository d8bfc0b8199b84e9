"""Check the pages: their commands, settings, verbs, files and links exist, and the program in own_model.md runs."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import AGENT
from tinytrain_dist import __version__
from tinytrain_dist.cli.main import VERBS, main
from tinytrain_dist.config.environment_variables import VARIABLES
from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.config.schema import FIELDS
from tinytrain_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md"]
PAGES += [*GUIDES, *DECISIONS]
REPOSITORY = "https://github.com/tinytrain-dist/tinytrain_dist/blob/main/"  # links of the site to files outside docs/
OF_OTHERS: dict[str, set[str]] = {  # flags of programs of others, and of the short scripts
    "python": {"nodes", "events", "extension_steps", "windows"},  # benchmarks/chaos.py, benchmarks/long_context.py
    "torchrun": {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_id", "rdzv_endpoint", "standalone"},
    "sbatch": {"nodes", "gpus_per_node", "cpus_per_task", "time", "array"},
    "launch/local.sh": {"nproc"},
    "launch/test.sh": {"fast", "torch"},
    "lm_eval": {"model", "device", "tasks", "model_args"},
    "tensorboard": {"logdir"},
    "mlflow": {"backend_store_uri"},
    "zensical": {"strict"},
}
PROGRAMS_OF_OTHERS = set(
    """cd git lm_eval pip mlflow pre-commit printf python sbatch source tensorboard tinytrain torchrun wandb
    zensical""".split()
)
OF_LAUNCHERS = {
    "help",
    "max-restarts",
    "max-requeues",
    "nnodes",
    "node-rank",
    "head",
    "store",
    "leave-on-sigterm",
    "dry-run",
    "follow",
    "version",
    "overwrite",
    "gpus",
    "batch-per-gpu",
    "network",
    "contexts",
    "host-memory",
}
OF_PREPARE = {"filter", "ids", "id-field", "chat", "dedup", "eos-token", "shard-tokens", "special-tokens", "text-field"}
OF_PREPARE |= {"max-document-bytes"}
OF_VERBS = {"all-windows", "decode", "html", "json", "slot", "step", "ema", "last", "data", "hours"}
OF_BENCHMARKS = {"quick", "without", "minutes", "paper"}
OF_LAUNCHERS |= {"print-run", "print-head"}  # former ones, which the changelog names
OF_LAUNCHERS |= {"filter", "shard-tokens"}  # of tinytrain prepare
HELP = {"tinytrain", "launch/submit.py", "launch/node.sh"}  # programs whose --help lists their flags
FORMER_OR_OPTIONAL = {
    "slurm/env.sh",
    "launch/agent.py",
    "checkpoint/run_folder.py",
}  # may be named though they are not in a checkout


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(text: str) -> list[str]:
    """Return the shell blocks of a page."""
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> list[list[str]]:
    lines = [line.strip() for block in blocks_of(text) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page_id(page), words) for page in PAGES for words in commands_of(page.read_text(encoding="utf-8"))]


@functools.cache
def flags_by_help(program: str, verb: str = "") -> set[str]:
    """Return the flags that the --help of a script or of a verb of tinytrain names."""
    if verb:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([verb, "--help"])
        text = printed.getvalue()
    else:
        start = [sys.executable] if program.endswith(".py") else []
        env = {**os.environ, "PYTHON": sys.executable}  # for the scripts in a checkout without an environment
        command = [*start, program, "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env).stdout
    return {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z0-9-_]*)", text)}


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
        known |= flags_by_help(program, words[1])
    elif program in HELP:
        known |= flags_by_help(program)
    for word in words:
        if re.match(r"(launch|configs|slurm|benchmarks)/", word):
            assert (ROOT / word).is_file(), f"{page} uses {word}"
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), f"{page} uses {word}"
    names = {flag.replace("-", "_") for word in words for flag in re.findall(r"^--([a-z][\w-]*)", word)}
    assert not names - known, f"{page} uses {names - known} with {program}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_shell_blocks_are_marked_and_can_be_parsed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^ *```(sh|shell|console|shell-session)\b", text, re.MULTILINE), "mark it as bash"
    for block in blocks_of(text):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}: {done.stderr}\n{block}"


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page} {words[0]}" for page, words in COMMANDS])
def test_programs_exist_and_settings_have_possible_values(page: str, words: list[str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    assert (ROOT / program).is_file() or program in PROGRAMS_OF_OTHERS, f"{page} starts {program}"
    configurations = [word for word in words if re.match(r"configs/[\w.]+\.toml$", word)]
    if program != "tinytrain" and configurations:
        parse_command_line([str(ROOT / configurations[0]), *settings_of(words)])


def settings_of(words: list[str]) -> list[str]:
    """Return the settings among the words of a command, with their values. The rest is for the launcher."""
    settings: list[str] = []
    is_setting = False
    for word in words:
        if flag := re.match(r"--(?:no-)?([a-z][\w-]*)", word):
            is_setting = flag[1].replace("-", "_") in FIELDS
        settings += [word] if is_setting else []
    return settings


def test_wrong_values_and_broken_blocks_are_noticed() -> None:
    (words,) = commands_of("```bash\nlaunch/local.sh configs/quickstart.toml --nproc 2 --lr-max -1\n```\n")
    with pytest.raises(ConfigError, match="lr_max"):
        test_programs_exist_and_settings_have_possible_values("a page", words)
    with pytest.raises(AssertionError, match="starts lunch"):
        test_programs_exist_and_settings_have_possible_values("a page", ["lunch/local.sh"])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_names_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text):
        in_repository = target.removeprefix(REPOSITORY) if target.startswith(REPOSITORY) else ""
        if "://" in target and not in_repository:
            continue
        linked = ROOT / in_repository if in_repository else page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(linked), f"{page.name} links to {target}{anchor}"
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`--([a-z-]+)`", prose):
        known = name in OF_LAUNCHERS | OF_PREPARE | OF_VERBS | OF_BENCHMARKS or name.replace("-", "_") in FIELDS
        assert known, f"{page.name} names --{name}"
    for verb in re.findall(r"`tinytrain ([a-z]+)", prose):
        assert verb in VERBS, f"{page.name} names tinytrain {verb}"
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_.]+\.(?:py|sh|sbatch|toml|md))`", prose):
        # pages on the code name files of the package, such as config/schema.py
        known = (ROOT / name).exists() or (ROOT / "tinytrain_dist" / name).exists() or name in FORMER_OR_OPTIONAL
        assert known, f"{page.name} names {name}"


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("pages", [GUIDES, DECISIONS], ids=["docs", "docs/decisions"])
def test_every_page_is_in_the_list_of_its_folder(pages: list[Path]) -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (pages[0].parent / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in pages} - {"README.md"}


@pytest.mark.parametrize(
    "page", [*GUIDES, *(ROOT / name / "README.md" for name in ("benchmarks", "examples"))], ids=page_id
)
def test_a_page_begins_with_its_purpose(page: Path) -> None:
    first = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert re.match(r"This page (shows|lists|describes)\b", first), f"{page.name} begins: {first[:80]}"


def test_every_decision_has_its_sections() -> None:
    for page in DECISIONS:
        text = page.read_text(encoding="utf-8")
        if page.name != "README.md":
            assert text.startswith(f"# {page.name[:3]}: "), page.name
            assert "\n*Status: " in text, page.name
            for heading in ("Context", "Choice", "Rejected alternatives"):
                assert f"\n## {heading}\n" in text, f"{page.name} has no section {heading}"


def test_the_glossary_is_short() -> None:
    rows = re.findall(
        r"^\| (.+?) \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    terms = [term for term, _ in rows[1:]]
    assert len(terms) == len(set(terms))
    assert 10 <= len(terms) <= 15, "a reader should not have to learn more terms of this project"


def test_every_package_is_on_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in sorted(path.parent.name for path in (ROOT / "tinytrain_dist").glob("*/__init__.py")):
        assert f"`{package}/`" in text, f"add {package}/ to the table of packages"


def test_every_variable_of_ours_is_in_the_table() -> None:
    """The page lists exactly the variables that package, scripts and CI use. Tests may use others."""
    files = [path for folder in ("tinytrain_dist", "launch", "slurm", ".ci") for path in (ROOT / folder).rglob("*")]
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file() and path.suffix != ".pyc"]
    used = {name for text in texts for name in re.findall(r"\bTINYTRAIN_[A-Z_]+[A-Z]\b", text)}
    page = (ROOT / "docs" / "environment_variables.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(TINYTRAIN_\w+)` \|", page, re.MULTILINE))
    assert used == documented
    assert not {variable.name for variable in VARIABLES} - set(re.findall(r"`([A-Z_]+)`", page))


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
    assert f'\nversion = "{__version__}"\n' in project


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
