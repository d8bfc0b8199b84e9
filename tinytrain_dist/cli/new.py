"""`tinytrain new`: make a folder for a run, with everything that a user edits. Must not know what the settings mean."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import tyro

from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.package_files import package_folder
from tinytrain_dist.utils.text import format_list

GITIGNORE = "data/\nruns/\n"
README = """\
# {name}

1. Data: `{prepare}`
2. Train: `tinytrain train config.toml` (all GPUs of this machine; stop with Ctrl-C; the same command resumes)
3. Look: `tinytrain status {run}`, or `tensorboard --logdir {run}/logs`
4. Slurm: edit `slurm/env.sh`; `tinytrain submit config.toml --nodes 2 --gpus-per-node 8 --time 24:00:00`
5. Use: `tinytrain sample {run} --prompt "Once upon a time"`; all commands: `tinytrain --help`
"""


def new(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    source: Annotated[str, tyro.conf.arg(name="from", metavar="NAME")] = "quickstart",
) -> int:
    """Make a folder for a run: a commented configuration, settings for Slurm, a .gitignore and a README.

    Args:
        folder: The folder to make. It may exist if it is empty.
        source: The configuration to begin with: quickstart, tinystories, gpt2_124m_ddp, llama_350m_fsdp, llama_1b_hsdp.
    """
    config = _config_named(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"DIR: {folder} exists already; give the name of a new or empty folder", "new")
    content = config.read_text(encoding="utf-8").replace(f"configs/{config.name}", "config.toml")
    run = re.search(r'^target_dir = "(.*)"', content, re.MULTILINE)
    prepare = re.search(r"tinytrain prepare .*", content)
    readme = README.format(
        name=folder.resolve().name,
        prepare=prepare[0] if prepare else "tinytrain prepare TEXT.txt --out data/mine",
        run=run[1] if run else "runs/default",
    )
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.toml", content)
    write_atomically(folder / "README.md", readme)
    write_atomically(folder / ".gitignore", GITIGNORE)
    shutil.copyfile(package_folder("slurm") / "env.example.sh", folder / "slurm" / "env.sh")
    print(f"{folder}: config.toml (from {source}), slurm/env.sh, README.md, .gitignore")
    print(f"next: cd {folder}, then the commands in README.md")
    return 0


def _config_named(name: str) -> Path:
    """Return the configuration of this name that comes with the package. A prefix of its name is enough."""
    configs = {path.stem: path for path in sorted(package_folder("configs").glob("*.toml"))}
    found = [path for stem, path in configs.items() if stem == name] or [
        path for stem, path in configs.items() if stem.startswith(name)
    ]
    if len(found) != 1:
        raise UsageError(f"--from: there is no configuration {name!r}; give one of {format_list(list(configs))}", "new")
    return found[0]


def main(args: list[str]) -> int:
    """Run `tinytrain new`."""
    return call_verb(new, "new", args)
