"""`tinytrain new`: make a folder for a run, with everything that a user edits. Must not know what the settings mean."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.config.run_folder import parse_toml
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.type_conversion import to_toml_value
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.huggingface_config import settings_of_hf_folder
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.json_files import read_json_dict
from tinytrain_dist.utils.option_types import Number, Text
from tinytrain_dist.utils.package_files import package_folder
from tinytrain_dist.utils.text import format_list

GITIGNORE = "data/\nruns/\n"
README = """\
# {name}

1. Data: {data}
2. Train: `tinytrain train config.toml` (all GPUs of this machine; stop with Ctrl-C; the same command resumes)
3. Look: `tinytrain status {run}`, or `tensorboard --logdir {run}/logs`
4. Slurm: edit `slurm/env.sh`; `tinytrain submit config.toml --nodes {nodes} --gpus-per-node {gpus} --time 24:00:00`
5. Use: `tinytrain sample {run} --prompt {prompt}`{prompt_note}; all commands: `tinytrain --help`
"""
FINE_TUNING = """\
# Fine-tuning of {model}.
#
# data       {prepare}
# command    tinytrain train config.toml

[run]
target_dir = "runs/fine_tuned"
init_from = {init_from}        # its weights are read once, at the start; a resumed run does not need them
total_steps = 200
log_every = 10
eval_every = 50
eval_steps = 4

[data]
train_data = "{data}/train.npy"
val_data = "{data}/val.npy"
{chat}batch_size = 16
micro_batch_size = 1            # higher is faster, if memory allows
context_len = {context_len}             # the model was made for up to {longest}

[model]                         # what {model}/config.json says; other values do not fit the weights
{sizes}

[optimizer]
lr_max = 2e-5                   # much lower than for training from random weights
lr_min = 2e-6
warmup_iters = 20
weight_decay = 0.0

[checkpoint]
ckpt_every = 100
"""
CHAT = """\
# For other text than conversations, prepare it without --chat, and leave out the next three settings.
packing = "best_fit"            # whole conversations in each window
document_mask = true            # attention stays within a conversation
loss_mask = true                # only the assistant's answers count
"""
CHAT_PROMPT_NOTE = ", where PROMPT is what the chat template writes up to the answer (see docs/own_data.md)"
FINE_TUNING_CONTEXT = 1024  # tokens; the model may have been made for more


@dataclass(frozen=True)
class Template:
    """A configuration to begin with, where its data comes from, and its run folder."""

    config: str
    data: str
    run: str
    nodes: int = 2
    gpus: int = 8
    prompt: str = '"Once upon a time"'  # for `tinytrain sample`
    prompt_note: str = ""


def new(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    source: Annotated[str | None, tyro.conf.arg(name="from", metavar="NAME", help_behavior_hint="")] = None,
    hours: Annotated[float | None, tyro.conf.arg(help_behavior_hint="")] = None,
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None,
    nodes: int = 1,
    devices_per_node: Number = None,
    device: Text = None,
) -> int:
    """Make a folder for a run: a commented configuration, settings for Slurm, a .gitignore and a README.

    Args:
        folder: The folder to make. It may exist if it is empty.
        source: The configuration to begin with: quickstart, tinystories, gpt2_124m_ddp, llama_350m_fsdp, llama_1b_hsdp.
            Or the folder of a Hugging Face model (Llama or Qwen3), to fine-tune it. Default: quickstart.
        hours: Propose a configuration for a run of so many hours on --data: size of the model, batch, learning rate,
            steps. Without a GPU, steps are timed on this machine first.
        data: With --hours: a folder that `tinytrain prepare` has made.
        nodes: With --hours: number of nodes.
        devices_per_node: With --hours: number of devices, and of processes, on each node. Default: as on this machine.
        device: With --hours: a GPU that `tinytrain plan --help` lists, or cpu (this machine). Default: h100, or cpu if
            this machine has no GPU.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"DIR: {folder} exists already; give the name of a new or empty folder", "new")
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UsageError(f"DIR: {str(folder)!r} is not valid UTF-8; give another name", "new") from None
    name = folder.resolve().name
    if hours is None:
        if data is not None or nodes != 1 or devices_per_node is not None or device is not None:
            raise UsageError("--data, --nodes, --devices-per-node, --device: need --hours; give it as well", "new")
        model = Path(source or "")
        is_model = source is not None and (model / "config.json").is_file()
        template = _of_model(model) if is_model else _of_package(source or "quickstart")
    else:
        template = _proposed(source, hours, data, nodes, devices_per_node, device, name)
    readme = README.format(name=name, **asdict(template))
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.toml", template.config)
    write_atomically(folder / "README.md", readme)
    write_atomically(folder / ".gitignore", GITIGNORE)
    shutil.copyfile(package_folder("slurm") / "env.example.sh", folder / "slurm" / "env.sh")
    origin = "proposed" if hours is not None else f"from {source or 'quickstart'}"
    print(f"{folder}: config.toml ({origin}), slurm/env.sh, README.md, .gitignore")
    end_of_options = "-- " if str(folder).startswith("-") else ""
    print(f"next: cd {end_of_options}{shlex.quote(str(folder))}, then the commands in README.md")
    return 0


def _proposed(
    source: str | None,
    hours: float,
    data: Path | None,
    nodes: int,
    devices_per_node: int | None,
    device: str | None,
    name: str,
) -> Template:
    """Return a configuration for a run of so many hours. Errors: UsageError, ConfigError."""
    if source is not None:
        raise UsageError("--from, --hours: one begins with a configuration, the other makes one; give one", "new")
    if data is None:
        raise UsageError("--hours: needs --data, because the size of a model depends on its data; give a folder", "new")
    from tinytrain_dist.cli.proposed_run import ProposalOptions, proposed_config  # only now: it imports torch

    options = ProposalOptions(hours, data, nodes, devices_per_node, device)
    run = f"runs/{name}"
    return Template(proposed_config(options, name), f"is in {data.resolve()}", run, nodes, options.per_node)


def _of_package(name: str) -> Template:
    """Return the configuration of this name that comes with the package. The beginning of its name is enough."""
    configs = {path.stem: path for path in sorted(package_folder("configs").glob("*.toml"))}
    found = [path for stem, path in configs.items() if stem == name] or [
        path for stem, path in configs.items() if stem.startswith(name)
    ]
    if len(found) > 1:
        fitting = format_list([path.stem for path in found])
        raise UsageError(f"--from: {name!r} fits {fitting}; give more of the name", "new")
    if not found:
        raise UsageError(
            f"--from: {name!r} is neither a configuration nor a folder with a config.json; give one of "
            f"{format_list(list(configs))}, or the folder of a Hugging Face model",
            "new",
        )
    content = found[0].read_text(encoding="utf-8").replace(f"configs/{found[0].name}", "config.toml")
    run = re.search(r'^target_dir = "(.*)"', content, re.MULTILINE)
    prepare = re.search(r"tinytrain prepare .*", content)
    return Template(
        content,
        f"`{prepare[0] if prepare else 'tinytrain prepare TEXT.txt --out data/mine'}`",
        run[1] if run else "runs/default",
    )


def _of_model(model: Path) -> Template:
    """Return a configuration that fine-tunes the model in a Hugging Face folder. Errors: ConfigError."""
    model = model.resolve()
    settings: dict[str, Any] = settings_of_hf_folder(model, "--from")
    longest = settings.pop("context_len", FINE_TUNING_CONTEXT)
    is_chat_model = _has_chat_template(model)
    text, data = ("chat.jsonl --chat", "data/chat") if is_chat_model else ("TEXT.txt", "data/mine")
    prepare = f"tinytrain prepare {text} --tokenizer {shlex.quote(str(model))} --out {data}"
    sizes = (f"{name} = {to_toml_value(value)}" for name, value in settings.items() if value is not None)
    content = FINE_TUNING.format(
        model=model,
        prepare=prepare,
        data=data,
        chat=CHAT if is_chat_model else "",
        init_from=to_toml_value(str(model)),
        context_len=min(longest, FINE_TUNING_CONTEXT),
        longest=longest,
        sizes="\n".join(sizes),
    )
    _check_values(content, model)
    template = Template(content, f"`{prepare}`", "runs/fine_tuned")
    return replace(template, prompt="PROMPT", prompt_note=CHAT_PROMPT_NOTE) if is_chat_model else template


def _has_chat_template(model: Path) -> bool:
    """Return whether a Hugging Face folder has a chat template, in one of the two places where it can be."""
    if (model / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_json_dict(model / "tokenizer_config.json").get("chat_template"))
    except (OSError, ValueError):  # without this file, or with a damaged one, which `tinytrain prepare` reports
        return False


def _check_values(content: str, model: Path) -> None:
    """Check that a configuration made from a model's config.json can be used. Errors: ConfigError."""
    source = f"{model}/config.json"
    try:
        sections = parse_toml(content.encode())
    except ValueError as error:
        raise ConfigError(f"has a value that cannot be used ({error}); correct the file", source) from None
    TrainingConfig.from_dict({name: value for section in sections.values() for name, value in section.items()}, source)


def main(args: list[str]) -> int:
    """Run `tinytrain new`."""
    return call_verb(new, "new", args)
