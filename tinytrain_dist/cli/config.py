"""`tinytrain config`: show every setting of a configuration, where its value comes from, and what it means.

Must not know what a setting means. The output is TOML, so it can be used as a configuration.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from tinytrain_dist.cli.arguments import parse_options
from tinytrain_dist.config.loading import load_config, read_command_line, read_toml, resolve_vocab_size
from tinytrain_dist.config.schema import FIELDS, TrainingConfig
from tinytrain_dist.config.sections import SECTIONS
from tinytrain_dist.config.type_conversion import to_toml_value
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.training.run_length import resolve_epochs

COMMENT_WIDTH = 110
DEFAULTS = TrainingConfig().to_dict()
DERIVED = "derived from other settings"


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    """Show every setting with its value, where the value comes from, and what it means.

    tinytrain config [CONFIG.toml] [--changed] [SETTINGS]

    The output is TOML. Without CONFIG.toml, the values are the defaults. The settings:
    """

    changed: bool = False
    """Show only settings whose value is not the default."""


def main(args: list[str]) -> int:
    """Print the resolved configuration with the origin of each value."""
    options, settings = parse_options(ConfigOptions, "config", args, pass_on_help=True)
    path, overrides = read_command_line(settings, "tinytrain config")
    config = load_config(path, overrides)
    origins = {name: "default" for name in FIELDS}
    if path is not None:
        origins |= dict.fromkeys(read_toml(path)[0], str(path))
    origins |= dict.fromkeys(overrides, "command line")
    values = config.to_dict()
    for name, value in config.resolved().items():
        if values[name] != value:
            values[name], origins[name] = value, DERIVED
    if config.vocab_size is None:
        values["vocab_size"], origins["vocab_size"] = _vocab_size(config)
    if config.epochs is not None:
        values["total_steps"], origins["total_steps"] = None, _total_steps(config)
    print(f"# {path or 'the defaults'}{' with settings of the command line' if overrides else ''}")
    print(_format(values, origins, options.changed))
    return 0


def _vocab_size(config: TrainingConfig) -> tuple[int | None, str]:
    """Return the vocabulary size of the data, and where it comes from."""
    try:
        return resolve_vocab_size(config).vocab_size, "meta.json of the data"
    except ConfigError:
        return None, "default; the run takes it from the meta.json of the data"


def _total_steps(config: TrainingConfig) -> str:
    """Return what total_steps will be, or why it is not known. A configuration has either it or epochs."""
    try:
        return f"epochs make it {resolve_epochs(config).total_steps}"
    except ConfigError as error:
        return str(error.problems[0])


def _format(values: dict[str, Any], origins: dict[str, str], changed_only: bool) -> str:
    """Return TOML with a comment above each setting: its meaning, then the origin of its value."""
    sections = []
    for section in SECTIONS:
        names = [name for name, setting in FIELDS.items() if setting.metadata["section"] == section]
        blocks = [
            _format_setting(name, values[name], origins[name])
            for name in names
            if not changed_only or (values[name] != DEFAULTS[name] and origins[name] != DERIVED)
        ]
        if blocks:
            sections.append("\n\n".join([f"[{section}]", *blocks]))
    return "\n\n".join(sections)


def _format_setting(name: str, value: Any, origin: str) -> str:
    comment = "\n".join(f"# {line}" for line in textwrap.wrap(FIELDS[name].metadata["help"], COMMENT_WIDTH))
    # TOML has no value for "not set"
    assignment = f"# {name} is not set" if value is None else f"{name} = {to_toml_value(value)}"
    return f"{comment}\n{assignment}  # {origin}" if value is not None else f"{comment}\n{assignment} ({origin})"
