"""`tinytrain completion`: print a script with which a shell completes verbs and options. Must not know any verb."""

from __future__ import annotations

from importlib import import_module
from typing import Literal

import tyro

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.utils.stale_files import scratch_folder


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print a script that completes verbs and options of `tinytrain`.

    bash: tinytrain completion bash >~/.local/share/bash-completion/completions/tinytrain

    zsh: tinytrain completion zsh >FOLDER/_tinytrain, with a FOLDER of $fpath

    fish: tinytrain completion fish >~/.config/fish/completions/tinytrain.fish

    Args:
        shell: Your shell.
    """
    from tinytrain_dist.cli.main import VERBS

    arguments = {verb.name: getattr(import_module(verb.module_name()), verb.arguments) for verb in VERBS.values()}
    with scratch_folder() as folder:
        script = folder / "script"
        try:
            tyro.extras.subcommand_cli_from_dict(
                arguments, prog="tinytrain", args=["--tyro-write-completion", shell, str(script)]
            )
        except SystemExit as exited:  # how tyro ends after it has written the script
            if exited.code:
                raise
        print(script.read_text(encoding="utf-8"))
    return 0


def main(args: list[str]) -> int:
    """Run `tinytrain completion`."""
    return call_verb(completion, "completion", args)
