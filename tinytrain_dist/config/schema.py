"""Join all settings of a run: `TrainingConfig`, one flat frozen dataclass that is checked when it is created.

Must not know torch, files, ranks or devices, so that a login node can check a run in a tenth of a second. The settings
themselves are in sections.py, the architecture of the model is in model_config.py, the checks of values are in
validation.py, and their types in type_conversion.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tinytrain_dist.config.model_config import MODEL_SETTINGS, ModelConfig
from tinytrain_dist.config.run_folder import CHECKPOINTS_FOLDER
from tinytrain_dist.config.sections import (
    SECTIONS,
    CheckpointSettings,
    ComputeSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
)
from tinytrain_dist.config.type_conversion import convert_value, describe_type, to_toml_value
from tinytrain_dist.config.validation import IDENTITY_SETTINGS as IDENTITY_SETTINGS
from tinytrain_dist.config.validation import find_problems
from tinytrain_dist.errors import ConfigError

HELP_COMMAND = "tinytrain config --help"


@dataclass(frozen=True)
class TrainingConfig(  # the fields of a dataclass begin with those of its last base
    CheckpointSettings,
    ComputeSettings,
    ParallelSettings,
    OptimizerSettings,
    ModelSettings,
    DataSettings,
    RunSettings,
):
    """All settings of a training run; a frozen dataclass, checked when it is created.

    Construction raises ConfigError with all problems at once. Derived values (`ffn_dim`, `checkpoints_dir`, ...) are
    properties, so that `dataclasses.replace(config, d_model=512)` never leaves a stale value behind.
    """

    def __post_init__(self) -> None:
        """Check all settings, and convert whole numbers to float where float is declared. Errors: ConfigError."""
        problems = []
        for name in FIELDS:
            value, problem = _convert_setting(name, getattr(self, name))
            if problem:
                problems.append(problem)
            else:
                object.__setattr__(self, name, value)
        problems = problems or find_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def model(self) -> ModelConfig:
        """The architecture alone: the value that a model is built from."""
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_SETTINGS})

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer; see ModelConfig."""
        return self.model.ffn_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads; see ModelConfig."""
        return self.model.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head; see ModelConfig."""
        return self.model.head_width

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.total_steps // 100 if self.warmup_iters is None else self.warmup_iters

    @property
    def cosine_end(self) -> int:
        """Step at which the schedule reaches lr_min."""
        return self.cosine_iters or self.total_steps

    @property
    def decay_steps(self) -> int:
        """Steps of the final decay of the WSD schedule."""
        return max(1, self.total_steps // 10) if self.decay_iters is None else self.decay_iters

    @property
    def checkpoints_dir(self) -> Path:
        """Folder that holds the checkpoints."""
        return Path(self.ckpt_dir) if self.ckpt_dir else Path(self.target_dir) / CHECKPOINTS_FOLDER

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, with tuples as lists. `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> TrainingConfig:
        """Return a configuration with these settings. Errors: ConfigError with all unknown names and bad values."""
        return _config_from_dict(values, source)

    def resolved(self) -> dict[str, Any]:
        """Return `to_dict` with derived values filled in, so that a default equals the same value set explicitly."""
        sizes = {"d_ff": self.ffn_dim, "num_kv_heads": self.kv_heads, "head_dim": self.head_width}
        rope_type = self.model.resolved_rope_type
        return {**self.to_dict(), **sizes, "rope_type": None if rope_type == "default" else rope_type}

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML, with derived sizes filled in; None is left out."""
        return _format_toml(self.resolved() | ({"total_steps": None} if self.epochs else {}))


FIELDS = {f.name: f for f in dataclasses.fields(TrainingConfig)}
HINTS = get_type_hints(TrainingConfig)


def _convert_setting(name: str, value: Any) -> tuple[Any, str]:
    """Return (converted value, ""), or (None, problem) if the setting is unknown or the value has the wrong type."""
    if name not in FIELDS:
        return None, f"{name}: unknown setting{_suggest_name(name)}"
    try:
        return convert_value(HINTS[name], value), ""
    except TypeError:
        return None, f"{name}: {value!r} is not {describe_type(HINTS[name])}"


def _config_from_dict(values: dict[str, Any], source: str) -> TrainingConfig:
    """Return a configuration with these settings; see TrainingConfig.from_dict."""
    problem_of = {name: _convert_setting(name, value)[1] for name, value in values.items()}
    problems = [problem for problem in problem_of.values() if problem]
    try:
        config = TrainingConfig(**{name: value for name, value in values.items() if not problem_of[name]})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], source) from None
    if problems:
        raise ConfigError(problems, source)
    return config


def _format_toml(values: dict[str, Any]) -> str:
    """Return settings as TOML in their sections, in the order of SECTIONS and of the fields. None is left out."""
    lines = ["# the resolved configuration of this run, written by tinytrain_dist"]
    for section in SECTIONS:
        lines.append(f"\n[{section}]")
        names = [f.name for f in FIELDS.values() if f.metadata["section"] == section]
        lines += [f"{name} = {to_toml_value(values[name])}" for name in names if values[name] is not None]
    return "\n".join(lines) + "\n"


def _suggest_name(name: str) -> str:
    """Return the end of the message about an unknown setting: the nearest known name, or where to find all names."""
    nearest = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; {HELP_COMMAND} lists all of them"
