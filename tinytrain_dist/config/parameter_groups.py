"""Read param_groups: which parameters get another learning rate or weight decay, chosen by patterns on their names.

An entry is written as "PATTERN, PATTERN: KEY=VALUE KEY=VALUE", in a TOML file and on the command line. `*` stands for
any characters, also for dots. A parameter belongs to the first entry with a pattern that matches its whole name. What
an entry does not set, and parameters that no entry matches, have the values of the run.

Must not know torch: the names come from the configuration of the model, or from a model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from tinytrain_dist.config.model_config import ModelConfig

KEYS = ("lr_factor", "weight_decay")


class NamedShape(NamedTuple):
    """A parameter: its names, of which checkpoints use the first, and its shape. Only a tied weight has two names."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GroupRule:
    """One entry of param_groups. None: the entry does not set this."""

    text: str
    patterns: tuple[str, ...]
    lr_factor: float | None = None
    weight_decay: float | None = None

    def matches(self, parameter: NamedShape) -> bool:
        """Return whether a pattern matches one of the parameter's names."""
        return any(fnmatchcase(name, pattern) for name in parameter.names for pattern in self.patterns)


@dataclass(frozen=True)
class ResolvedGroup:
    """Parameters that are updated with the same values.

    * `title`: the patterns, or what else these parameters have in common.
    * `lr_factor`: their learning rate is this times that of the schedule.
    * `parameters`: in the order of the model.
    """

    title: str
    lr_factor: float
    weight_decay: float
    parameters: tuple[NamedShape, ...]

    def record(self) -> dict[str, object]:
        """Return the group as JSON values."""
        return {
            "group": self.title,
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


def resolve_groups(
    parameters: Iterable[NamedShape], param_groups: Sequence[str], weight_decay: float
) -> list[ResolvedGroup]:
    """Return the groups of a checked value of param_groups, in the order of its entries; then all other parameters.

    weight_decay: of matrices (two or more axes) whose entry sets none. Vectors such as norm weights then have none.
    """
    rules = [_parse(text) for text in param_groups]
    everything_else = GroupRule("all others", ())
    members: dict[tuple[int, bool], list[NamedShape]] = {}
    for parameter in parameters:
        index = next((index for index, rule in enumerate(rules) if rule.matches(parameter)), len(rules))
        is_vector = len(parameter.shape) < 2
        divided = [*rules, everything_else][index].weight_decay is None  # matrices and vectors decay differently
        members.setdefault((index, is_vector and divided), []).append(parameter)
    groups = []
    for (index, are_vectors), found in sorted(members.items()):
        rule = [*rules, everything_else][index]
        kind = "vectors" if are_vectors else "matrices"
        divided = rule.weight_decay is None
        default_decay = 0.0 if are_vectors else weight_decay
        groups.append(
            ResolvedGroup(
                title=", ".join(rule.patterns) or (kind if not rules else f"other {kind}"),
                lr_factor=1.0 if rule.lr_factor is None else rule.lr_factor,
                weight_decay=default_decay if divided else rule.weight_decay or 0.0,
                parameters=tuple(found),
            )
        )
    return groups


def describe_groups(groups: Sequence[ResolvedGroup], lr_max: float) -> str:
    """Format the groups as a table, one per line. lr_max: highest learning rate of the schedule."""
    heading = "parameter group"
    width = max(len(heading), *(len(group.title) for group in groups))
    lines = [f"  {heading:<{width}}{'tensors':>9}{'parameters':>16}{'lr_max':>11}{'weight_decay':>14}"]
    for group in groups:
        numbers = f"{len(group.parameters):>9,}{group.num_weights:>16,}{lr_max * group.lr_factor:>11.3g}"
        lines.append(f"  {group.title:<{width}}{numbers}{group.weight_decay:>14g}")
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
        left = [parameter for parameter in left if not rule.matches(parameter)]
    return problems


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
    numbers = {key: float(value) for key, _, value in (word.partition("=") for word in words)}
    return GroupRule(text, tuple(patterns), numbers.get("lr_factor"), numbers.get("weight_decay"))


def _number(text: str) -> float | None:
    """Return the number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None
