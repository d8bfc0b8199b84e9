"""`tinytrain completion`: a script for each shell that names every verb and its options."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers.tools import Cli
from tinytrain_dist.cli.main import VERBS


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_verbs_and_options(tinytrain: Cli, shell: str) -> None:
    code, out, err = tinytrain("completion", shell)
    assert code == 0, err
    assert all(name in out for name in VERBS)
    assert "max-new-tokens" in out, "an option of sample"
    assert "max-requeues" in out, "an option of submit"
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_bash_completes_a_verb(tinytrain: Cli) -> None:
    script = tinytrain("completion", "bash")[1]
    ask = f"{script}\nCOMP_WORDS=(tinytrain sta) COMP_CWORD=1 COMP_LINE='tinytrain sta' COMP_POINT=13\n"
    ask += 'complete -p tinytrain >/dev/null || exit 1\n$(complete -p tinytrain | sed "s/.*-F \\([^ ]*\\).*/\\1/") '
    ask += 'tinytrain sta tinytrain\nprintf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["status"], done.stderr
