"""Write docs/configuration.md: every setting with its default, constraints and effect on the computed bits.

Usage: .venv/bin/python docs/scripts/configuration_page.py

All facts come from the package: the settings from config/schema.py, the constraints from config/validation.py,
config/model_config.py, config/rope_scaling.py, config/parameter_groups.py and config/parallel_problems.py, and what a
resume compares from the lists that it uses. A test checks that the page is current.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tinytrain_dist.config import (
    checkpoint_copies,
    model_config,
    parallel_problems,
    parameter_groups,
    rope_scaling,
    validation,
)
from tinytrain_dist.config.schema import FIELDS, HINTS
from tinytrain_dist.config.sections import SECTIONS
from tinytrain_dist.config.type_conversion import describe_type, to_toml_value

PAGE = Path(__file__).resolve().parents[1] / "configuration.md"

HEAD = """# Configuration

This page lists every setting, so that you can choose its value and know what a change does to a run. It is written by
`docs/scripts/configuration_page.py` from the code; do not edit it by hand.

A configuration is a TOML file. The files in `configs/` are examples. Each setting is under the heading of its section,
or above all headings. The command line overrides the file. It uses the same names, with dashes or underscores:

```bash
tinytrain train configs/quickstart.toml --lr-max 3e-3 --total-steps 300
```

An unknown name, a value of the wrong type, a value out of range and a setting without effect are errors. All errors of
a configuration are reported at once, before anything starts. `tinytrain plan` checks a configuration without training.
`tinytrain config configs/quickstart.toml` prints every setting with its value and where the value comes from.

For each setting, the page has

* its meaning, the values that it takes, and its default;
* the messages with which it is refused, where an ellipsis stands for a value;
* its effect on the bits of the weights.

## Effects on bits

* **fixed**: a change trains something else: another model, other data or other initial weights. A resume with another
  value is refused, unless `allow` names the setting.
* **rounding**: a change rounds results differently, so the last bits differ. A resume with another value is refused if
  `reproducible = true`, unless `allow_drift = true`.
* **update**: a change applies to the updates of the steps that follow. A resume accepts it, and prints what changed.
* **layout**: a change moves work between ranks, or into the backward pass. With `reproducible = true` the bits stay the
  same. Without it, the last bits can differ. A resume accepts it.
* **start**: the setting chooses the weights from which a run starts.
* **none**: the setting does not change the bits. A resume accepts it.

[Reproducibility](reproducibility.md) says which bits are promised, and [Resuming](resume.md) how to resume with other
settings.
"""

TITLES = {
    "run": "the run as a whole: folder, length, limits, logs, resume",
    "data": "token files and batches",
    "model": "the architecture; a Hugging Face `config.json` in each checkpoint holds the same values",
    "optimizer": "the update of the weights, clipping and the learning-rate schedule",
    "parallel": "how ranks share the work",
    "compute": "types, kernels and reproducible mode",
    "checkpoint": "when checkpoints are saved, and which are kept",
}

# A resume also compares the data, the kernels of the device and the number of threads.
FIXED = {*validation.IDENTITY_SETTINGS, "train_data", "token_dtype"}
ROUNDING = {*validation.ROUNDING_SETTINGS, "device", "cpu_threads"}
# A test trains with all other settings changed, and expects the same bits.
NOT_IN_THE_UPDATE = {"max_skipped_steps"}
UPDATE = {name for name, f in FIELDS.items() if f.metadata["section"] == "optimizer"} - NOT_IN_THE_UPDATE - FIXED
UPDATE |= {"total_steps", "epochs", "skip_steps"}
LAYOUT = {"parallel", "dp_replicate", "dp_shard", "reshard_after_forward", "activation_checkpointing"}
START = {"init_from", "resume", "ckpt_path_to_resume"}

RANGES = {
    "at least 1": (*validation.AT_LEAST_ONE, *validation.NONE_OR_AT_LEAST_ONE),
    "greater than 0 and finite": validation.POSITIVE_AND_FINITE,
    "not negative": validation.NOT_NEGATIVE,
}


def effect_on_bits(name: str) -> str:
    """Return the effect of a setting on the computed bits: a label of the table in HEAD."""
    if name in FIXED:
        return "fixed"
    if name in ROUNDING:
        return "rounding"
    if name in UPDATE:
        return "update"
    if name in START:
        return "start"
    return "layout" if name in LAYOUT else "none"


def refusals() -> dict[str, list[str]]:
    """Return, for each setting, the messages with which a combination of values is refused.

    They are read from the source of the checks. An ellipsis stands for each value in a message.
    """
    messages: dict[str, list[str]] = {name: [] for name in FIELDS}
    for module in (validation, model_config, rope_scaling, parameter_groups, parallel_problems, checkpoint_copies):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_problems"):
                for names, text in _messages_of(function):
                    for name in names:
                        messages[name].append(re.sub("^…:", f"{name}:", text))
    return messages


def _messages_of(function: ast.FunctionDef) -> Iterator[tuple[list[str], str]]:
    """Yield the settings that each message of a check begins with, and the message."""
    nodes = list(ast.walk(function))
    loops = [node for node in nodes if isinstance(node, ast.comprehension | ast.For)]
    looped_over = [word for loop in loops for word in ast.walk(loop.iter)]
    looped_over += [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys if key is not None]
    strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts_of_strings = {part for string in strings for part in ast.walk(string) if part is not string}
    for node in nodes:
        if node in parts_of_strings or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
        subject, colon, _ = text.partition(": ")
        names = subject.split(", ")
        if subject == "…":  # "{name}: ..." in a loop over names
            names = [str(word.value) for word in looped_over if isinstance(word, ast.Constant)]
        if colon and names and all(name in FIELDS for name in names):
            yield names, text


def describe(name: str, refused: list[str]) -> str:
    """Return the section of the page about one setting."""
    setting = FIELDS[name]
    text = str(setting.metadata["help"])
    if not re.match(r"\w+(, \w+)?:", text):  # not a value of the setting, as in "wsd: steps of the final decay"
        text = text[0].upper() + text[1:]
    kind = describe_type(HINTS[name])
    default = "None" if setting.default is None else to_toml_value(setting.default)
    rules = [rule for rule, names in RANGES.items() if name in names]
    lines = [f"### `{name}`", "", f"{escape(text)}.", "", f"* Value: {kind}. Default: `{default}`."]
    if rules:
        lines.append(f"* Range: {', '.join(rules)}.")
    lines.append(f"* Bits: {effect_on_bits(name)}.")
    lines += [f"* Refused: `{message}`" for message in refused]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return a help text in Markdown, which would read two asterisks as the begin of bold text."""
    return text.replace("*", "\\*")


def page() -> str:
    """Return the content of the page."""
    refused = refusals()
    parts = [HEAD]
    for section in SECTIONS:
        names = [name for name, setting in FIELDS.items() if setting.metadata["section"] == section]
        parts.append(f"## [{section}]\n\nThese settings are about {TITLES[section]}.\n")
        parts += [describe(name, refused[name]) + "\n" for name in names]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
