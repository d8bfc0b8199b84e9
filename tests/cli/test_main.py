"""The `tinytrain` command: verbs, mistakes, a reader that closes the pipe, and errors of the system."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.ranks import default_signals
from tests.helpers.tools import Cli
from tinytrain_dist.cli import ls, main
from tinytrain_dist.cli.tables import new_table, print_table


def test_every_verb_has_an_entry() -> None:
    for verb in main.VERBS.values():
        module = import_module(verb.module_name())
        assert callable(module.main)
        assert callable(getattr(module, verb.arguments))


def test_verbs_that_need_no_torch_do_not_import_it(folder: Path, tmp_path: Path) -> None:
    """Importing torch takes seconds, and these verbs are to answer at once."""
    run, config = folder / "one", folder / "one" / "config.toml"
    commands = [
        ["--help"], ["--version"], ["new", tmp_path / "new"], ["config", config], ["schedule", config, "--text"],
        ["train", config, "--dry-run"], ["submit", config, "--time", "30", "--processes-per-node", "1", "--dry-run"],
        ["status", run], ["ls", run], ["ls", folder], ["plot", run, "--out", tmp_path / "loss.png"],
        ["prune", "--help"], ["verify", "--help"], ["prepare", "--help"], ["completion", "--help"],
    ]  # fmt: skip
    script = (
        "import sys\nfrom tinytrain_dist.cli.main import main\n"
        "def call(args):\n    try: return main(args)\n    except SystemExit as end: return end.code or 0\n"
        f"for args in {[[str(word) for word in command] for command in commands]!r}:\n"
        "    code = call(args)\n    print(args, code, 'torch' in sys.modules, file=sys.stderr)\n"
        "    assert code == 0 and 'torch' not in sys.modules, args\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_lists_every_verb_once(tinytrain: Cli) -> None:
    code, out, _ = tinytrain("--help")
    assert code == 0
    for verb in main.VERBS.values():
        assert out.count(f"\n  {verb.name} ") == 1
        assert verb.summary in out
    assert tinytrain()[0] == 2


def test_an_unknown_verb_gets_the_nearest(tinytrain: Cli) -> None:
    code, _, err = tinytrain("verfy")
    assert code == 2
    assert "did you mean verify?" in err


@pytest.mark.parametrize("verb", ["ls", "verify", "hash", "sample", "plot", "report"])
def test_a_folder_without_a_run_is_an_error(tinytrain: Cli, tmp_path: Path, verb: str) -> None:
    missing = tmp_path / "nothing-here"
    code, out, err = tinytrain(verb, missing)
    assert (code, out) == (2, "")
    assert f"error: {missing}: is not a folder; give a run" in err
    code, _, err = tinytrain(verb, tmp_path)
    assert code == 2
    assert "contains neither a run nor a checkpoint" in err


def test_a_reader_that_closes_the_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(ls, "main", broken)
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main.main(["ls"]) == 141


def test_a_table_that_nobody_reads_has_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def show_table(_: list[str]) -> int:
        print_table(new_table("a"))
        return 0

    monkeypatch.setattr(ls, "main", show_table)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main.main(["ls"]) == 141


def test_too_little_memory_is_a_sentence(tinytrain: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls, "main", lambda _: len(bytearray(1 << 62)))
    assert tinytrain("ls") == (1, "", "error: not enough memory; ask for less\n")


def test_errors_of_the_system_are_reported_without_a_traceback(tinytrain: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "runs")

    monkeypatch.setattr(ls, "main", refused)
    assert tinytrain("ls") == (1, "", "error: [Errno 13] Permission denied: 'runs'\n")


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "train"])
def test_outputs_that_are_closed_give_no_traceback(arguments: str) -> None:
    command = f"{sys.executable} -m tinytrain_dist {arguments}"
    for line in (f"{command} >&-", f"{command} 2>&-", f"set -o pipefail; {command} | true"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 2, 141), line
        assert "Traceback" not in done.stderr, line


INTERRUPTED = """
import os, signal, sys
def hook(event, details):
    if event == "open" and sys.argv[1] in str(details[0]):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
from tinytrain_dist.__main__ import main
sys.exit(main(["config", sys.argv[2]]))
"""


# while the command is imported, while a verb is imported, and while a verb runs
@pytest.mark.parametrize("opened", ["cli/__pycache__/main.", "cli/__pycache__/config.", "c.toml"])
def test_an_interrupt_at_any_time_ends_a_verb_with_one_line(opened: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    command = [sys.executable, "-c", INTERRUPTED, opened, str(tmp_path / "c.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=default_signals)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_current_folder_that_was_removed_is_reported(tmp_path: Path) -> None:
    for arguments in ("tinytrain_dist status /tmp", "tinytrain_dist new x", "tinytrain_dist.agent --standalone x.py"):
        (tmp_path / "gone").mkdir()
        command = f"rmdir ../gone; exec {sys.executable} -P -m {arguments}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path / "gone", capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("error: the current folder has been removed; change to one that exists"), done
        assert len(done.stderr.splitlines()) == 1
