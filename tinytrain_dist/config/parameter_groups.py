"""Divide parameters into groups: by param_groups, which has patterns on their names, and by what the optimizer suits.

An entry is written as "PATTERN, PATTERN: KEY=VALUE KEY=VALUE", in a TOML file and on the command line. `*` stands for
any characters, also for dots. A parameter belongs to the first entry with a pattern that matches its whole name. What
an entry does not set, and parameters that no entry matches, have the values of the run.

With `optimizer = "muon"`, Muon updates the matrices of blocks, and AdamW everything else.

Must not know torch: the names come from the configuration of the model, or from a model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple, get_args

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.config.sections import OptimizerName

if TYPE_CHECKING:  # not at run time, because schema.py imports this module's user
    from tinytrain_dist.config.schema import TrainingConfig

OPTIMIZERS = get_args(OptimizerName)
KEYS = ("lr_factor", "weight_decay", "optimizer")


class NamedShape(NamedTuple):
    """A parameter: its names, of which checkpoints use the first, and its shape. Only a tied weight has two names."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def is_block_matrix(self) -> bool:
        """Whether it is a matrix in one of the model's blocks."""
        return len(self.shape) == 2 and re.search(r"(^|\.)layers\.\d+\.", self.names[0]) is not None


@dataclass(frozen=True)
class GroupRule:
    """One entry of param_groups. None: the entry does not set this."""

    text: str
    patterns: tuple[str, ...]
    lr_factor: float | None = None
    weight_decay: float | None = None
    optimizer: str | None = None

    def matches(self, parameter: NamedShape) -> bool:
        """Return whether a pattern matches one of the parameter's names."""
        return any(fnmatchcase(name, pattern) for name in parameter.names for pattern in self.patterns)


@dataclass(frozen=True)
class ResolvedGroup:
    """Parameters that are updated with the same values.

    * `title`: the patterns, or what else these parameters have in common.
    * `optimizer`: its name, one of OPTIMIZERS.
    * `lr_factor`: their learning rate is this times that of the schedule.
    * `parameters`: in the order of the model.
    """

    title: str
    optimizer: str
    lr_factor: float
    weight_decay: float
    parameters: tuple[NamedShape, ...]

    def record(self) -> dict[str, object]:
        """Return the group as JSON values."""
        return {
            "group": self.title,
            "optimizer": self.optimizer,
            "tensors": len(self.parameters),
            "parameters": self.num_weights,
            "lr_factor": self.lr_factor,
            "weight_decay": self.weight_decay,
        }

    @property
    def num_weights(self) -> int:
        """Number of weights in all its parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)


def named_shapes(model: ModelConfig) -> list[NamedShape]:
    """Return the parameters of the model that this configuration describes, in order."""
    head = "lm_head.weight"
    shapes = model.parameter_shapes()
    tied = {"model.embed_tokens.weight": (head,)} if model.tie_embeddings else {}
    return [NamedShape((name, *tied.get(name, ())), shape) for name, shape in shapes.items()]


def resolve_groups(parameters: Iterable[NamedShape], config: TrainingConfig) -> list[ResolvedGroup]:
    """Return the groups of parameters, those of the same optimizer one after the other.

    Within each optimizer, the groups of param_groups come in the order of its entries; then all other parameters. What
    an entry does not set is decided by the shape: matrices (two or more axes) decay, vectors such as norm weights do
    not. So an entry may become two groups.
    """
    rules = [_parse(text) for text in config.param_groups]
    rules.append(GroupRule("", ()))  # all others
    members: dict[tuple[int, int, bool], list[NamedShape]] = {}
    for parameter in parameters:
        index = next((index for index, rule in enumerate(rules) if rule.matches(parameter)), len(rules) - 1)
        optimizer = OPTIMIZERS.index(_optimizer_of(parameter, rules[index], config.optimizer))
        is_vector = len(parameter.shape) < 2
        members.setdefault((optimizer, index, is_vector and rules[index].weight_decay is None), []).append(parameter)
    groups = []
    for (optimizer, index, are_vectors), found in sorted(members.items()):
        rule = rules[index]
        kind = "vectors" if are_vectors else "matrices"
        weight_decay = 0.0 if are_vectors else config.weight_decay
        groups.append(
            ResolvedGroup(
                title=", ".join(rule.patterns) or (f"other {kind}" if len(rules) > 1 else kind),
                optimizer=OPTIMIZERS[optimizer],
                lr_factor=1.0 if rule.lr_factor is None else rule.lr_factor,
                weight_decay=weight_decay if rule.weight_decay is None else rule.weight_decay,
                parameters=tuple(found),
            )
        )
    return groups


def _optimizer_of(parameter: NamedShape, rule: GroupRule, default: str) -> str:
    """Return the optimizer of a parameter that belongs to `rule`. default: the setting `optimizer`."""
    if rule.optimizer is not None:
        return rule.optimizer
    return default if parameter.is_block_matrix else "adamw"


def optimizer_of_parameters(config: TrainingConfig) -> dict[str, str]:
    """Return the name of the optimizer of each parameter, by the name of the parameter in checkpoints."""
    groups = resolve_groups(named_shapes(config.model), config)
    return {parameter.names[0]: group.optimizer for group in groups for parameter in group.parameters}


def has_special_groups(config: TrainingConfig) -> bool:
    """Return whether the groups are others than matrices with weight decay and vectors without, both with AdamW."""
    return bool(config.param_groups) or config.optimizer != "adamw"


def blocks_are_alike(config: TrainingConfig) -> bool:
    """Return whether all blocks have the same groups, also by patterns, so that a few blocks can stand for all."""
    one_block = named_shapes(dataclasses.replace(config.model, num_layers=1))
    if group_problems(one_block, config.param_groups):
        return False
    groups_of_block: dict[str, list[tuple[str, int]]] = {}
    for index, group in enumerate(resolve_groups(named_shapes(config.model), config)):
        for parameter in group.parameters:
            block = re.match(r"model\.layers\.\d+\.", parameter.names[0])
            if block:
                name = parameter.names[0].removeprefix(block[0])
                groups_of_block.setdefault(block[0], []).append((name, index))
    first, *others = groups_of_block.values()
    return all(sorted(first) == sorted(other) for other in others)


def describe_groups(groups: Sequence[ResolvedGroup], lr_max: float) -> str:
    """Format the groups as a table, one per line. lr_max: highest learning rate of the schedule."""
    heading = "parameter group"
    width = max(len(heading), *(len(group.title) for group in groups))
    columns = f"{'tensors':>9}{'parameters':>16}{'lr_max':>11}{'weight_decay':>14}"
    lines = [f"  {heading:<{width}}{'optimizer':>11}{columns}"]
    for group in groups:
        numbers = f"{len(group.parameters):>9,}{group.num_weights:>16,}{lr_max * group.lr_factor:>11.3g}"
        lines.append(f"  {group.title:<{width}}{group.optimizer:>11}{numbers}{group.weight_decay:>14g}")
    return "\n".join(lines)


def group_problems(parameters: Sequence[NamedShape], param_groups: Sequence[str]) -> list[str]:
    """Return what is wrong with param_groups, as sentences. parameters: of the model."""
    problems = [problem for text in param_groups for problem in _entry_problems(text)]
    return problems or _pattern_problems(parameters, [_parse(text) for text in param_groups])


def _entry_problems(text: str) -> list[str]:
    """Return what is wrong with one entry, without knowing any parameter."""
    patterns, values = _split(text)
    if not (all(patterns) and values):
        return [
            f"param_groups: {text!r} must be PATTERN, PATTERN: KEY=VALUE KEY=VALUE, for example "
            f"'lm_head.*: lr_factor=0.5'; the keys are {', '.join(KEYS)}"
        ]
    problems = []
    given: dict[str, str] = {}
    for word in values:
        key, equals, value = word.partition("=")
        if key not in KEYS or not equals:
            nearest = difflib.get_close_matches(key, KEYS, n=1)
            remedy = f"did you mean {nearest[0]}=?" if nearest else f"the keys are {', '.join(KEYS)}"
            problems.append(f"param_groups: {word!r} in {text!r} is not KEY=VALUE with a known key; {remedy}")
        elif key in given:
            problems.append(f"param_groups: {text!r} sets {key} to {given[key]} and to {value}; keep one")
        elif key == "optimizer":
            if value not in OPTIMIZERS:
                problems.append(f"param_groups: {word!r} in {text!r} must be one of {', '.join(OPTIMIZERS)}")
        elif (number := _number(value)) is None or not 0 <= number < math.inf:
            problems.append(f"param_groups: {word!r} in {text!r} must be a finite number that is not negative")
        given[key] = value
    return problems


def _pattern_problems(parameters: Sequence[NamedShape], rules: Sequence[GroupRule]) -> list[str]:
    """Return a sentence for each pattern that no parameter takes its values from."""
    problems = []
    left = list(parameters)
    for index, rule in enumerate(rules):
        for pattern in rule.patterns:
            alone = GroupRule(rule.text, (pattern,))
            if any(alone.matches(parameter) for parameter in left):
                continue
            matching = next((parameter for parameter in parameters if alone.matches(parameter)), None)
            if matching is None:
                problems.append(
                    f"param_groups: {pattern!r} matches no parameter of the model; {_suggest(pattern, parameters)}"
                )
            else:
                earlier = next(before for before in rules[:index] if before.matches(matching))
                problems.append(
                    f"param_groups: {pattern!r} in {rule.text!r} has no effect, because all that it matches belongs to "
                    f"the earlier entry {earlier.text!r}; list the narrower patterns first"
                )
        own = [parameter for parameter in left if rule.matches(parameter)]
        problems += _muon_problems(rule, own)
        left = [parameter for parameter in left if parameter not in own]
    return problems


def _muon_problems(rule: GroupRule, parameters: Sequence[NamedShape]) -> list[str]:
    """Return a sentence if an entry lets Muon update something that is no matrix."""
    others = [parameter for parameter in parameters if len(parameter.shape) != 2]
    if rule.optimizer != "muon" or not others:
        return []
    return [
        f"param_groups: {rule.text!r} sets optimizer=muon for {others[0].names[0]} of shape {list(others[0].shape)}, "
        "but Muon updates matrices only; narrow the pattern, or leave optimizer=muon out"
    ]


def _suggest(pattern: str, parameters: Sequence[NamedShape]) -> str:
    """Return what to write instead of a pattern that matches nothing."""
    for wider in (f"*{pattern}*", f"*{pattern.strip('*')}*"):
        if any(GroupRule("", (wider,)).matches(parameter) for parameter in parameters):
            return f"a pattern must match the whole name, so write {wider!r}"
    names = [name for parameter in parameters for name in parameter.names]
    nearest = difflib.get_close_matches(pattern, names, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"names are for example {names[0]}, {names[1]}, {names[-1]}"


def _split(text: str) -> tuple[list[str], list[str]]:
    """Return the patterns and the words KEY=VALUE of an entry."""
    patterns, _, values = text.partition(":")
    return [pattern.strip() for pattern in patterns.split(",")], values.split()


def _parse(text: str) -> GroupRule:
    """Return the rule that a checked entry describes."""
    patterns, words = _split(text)
    values = {key: value for key, _, value in (word.partition("=") for word in words)}
    numbers = {key: float(values[key]) for key in ("lr_factor", "weight_decay") if key in values}
    return GroupRule(text, tuple(patterns), **numbers, optimizer=values.get("optimizer"))


def _number(text: str) -> float | None:
    """Return the number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None
