"""Read batch_size_warmup, and tell the batch size of every step and the sequences up to it: pure functions of the step.

A phase is written as "STEP: BATCH_SIZE", as the phases of train_weights are. Must not know ranks or other settings.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinytrain_dist.config.batch_sizes import divides, nearest_batch_sizes


class BatchPhase(NamedTuple):
    """The batch size from a step on, until the next phase begins. from_step: completed steps."""

    from_step: int
    batch_size: int


@dataclass(frozen=True)
class BatchSizes:
    """The batch size of every step of a run. All numbers follow from the phases, so nothing is counted or saved."""

    phases: tuple[BatchPhase, ...]  # in the order of their steps; the first begins at step 0

    @classmethod
    def of(cls, batch_size: int, warmup: Sequence[str] | None = None) -> BatchSizes:
        """Return the sizes of a run. warmup: a checked value of batch_size_warmup."""
        phases = tuple(phase for text in warmup or () if (phase := _parse(text)))
        return cls(phases or (BatchPhase(0, batch_size),))

    def at(self, step: int) -> int:
        """Return the sequences of the step after `step` completed steps."""
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.from_step) - 1].batch_size

    def before(self, step: int) -> int:
        """Return the sequences of the first `step` steps together."""
        ends = [*(phase.from_step for phase in self.phases[1:]), step]
        return sum(
            (min(end, step) - phase.from_step) * phase.batch_size
            for phase, end in zip(self.phases, ends, strict=True)
            if phase.from_step < step
        )

    def steps_for(self, sequences: int) -> int:
        """Return the fewest steps that have at least so many sequences together."""
        # the last phase that begins before they are complete
        phase = [phase for phase in self.phases if self.before(phase.from_step) < max(1, sequences)][-1]
        return phase.from_step + -(-(sequences - self.before(phase.from_step)) // phase.batch_size)

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> BatchSizes | None:
        """Return the sizes of unchecked settings, as in the config.toml of a run; None if they are not valid."""
        size, warmup = settings.get("batch_size"), settings.get("batch_size_warmup")
        if type(size) is not int or size < 1:
            return None
        if warmup is None:
            return cls.of(size)
        is_list = isinstance(warmup, list) and all(isinstance(text, str) for text in warmup)
        return cls.of(size, warmup) if is_list and not batch_warmup_problems(warmup, size) else None

    @property
    def varies(self) -> bool:
        """Whether not all steps have the same size."""
        return len(self.phases) > 1

    @property
    def common_divisor(self) -> int:
        """The largest number of sequences into which the batches of all phases can be divided."""
        return math.gcd(*(phase.batch_size for phase in self.phases))

    def __str__(self) -> str:
        return ", ".join(f"{size} from step {step:,} on" for step, size in self.phases)


def _parse(text: str) -> BatchPhase | None:
    """Return the phase that a text describes; None if it is malformed."""
    step, _, batch_size = text.partition(":")
    with contextlib.suppress(ValueError):
        phase = BatchPhase(int(step), int(batch_size))
        return phase if phase.from_step >= 0 and phase.batch_size >= 1 else None
    return None


def sizes_before(batch_size: int, warmup: Sequence[str] | None, last_step: int) -> tuple[int, tuple[str, ...] | None]:
    """Return batch_size and batch_size_warmup without the phases that begin at `last_step` or later.

    A shorter run does not have these phases. warmup: a checked value of batch_size_warmup.
    """
    texts = tuple(text for text in warmup or () if (phase := _parse(text)) and phase.from_step < last_step)
    size = BatchSizes.of(batch_size, texts).phases[-1].batch_size
    return size, texts if len(texts) > 1 else None


def batch_warmup_problems(
    warmup: Sequence[str],
    batch_size: int,
    micro_batch_size: int | None = None,
    reproducible: bool = False,
    total_steps: int | None = None,
) -> list[str]:
    """Return what is wrong with batch_size_warmup, as sentences.

    micro_batch_size, total_steps: None if they are not known.
    """
    malformed = [text for text in warmup if _parse(text) is None]
    if malformed:
        example = f"'0: {max(1, batch_size // 2)}' '1000: {batch_size}'"
        return [f"batch_size_warmup: {text!r} must be STEP: BATCH_SIZE, for example {example}" for text in malformed]
    phases = BatchSizes.of(batch_size, warmup).phases
    first, last = phases[0], phases[-1]
    problems = []
    if len(phases) == 1:
        problems.append("batch_size_warmup: one phase has no effect beside batch_size; leave it out, or add phases")
    if first.from_step != 0:
        problems.append(f"batch_size_warmup: the first phase begins at step {first.from_step}; let it begin at step 0")
    if last.batch_size != batch_size:
        problems.append(
            f"batch_size_warmup: its last phase has {last.batch_size} sequences, but batch_size is {batch_size}; set "
            f"batch_size to {last.batch_size}, or end with a phase of {batch_size}"
        )
    problems += _order_problems(phases)
    late = [phase for phase in phases[1:] if total_steps is not None and phase.from_step >= total_steps]
    if late and not problems:
        size, shorter = sizes_before(batch_size, warmup, total_steps or 0)
        several = len(late) > 1
        which = f"its last {len(late)} phases, from step {late[0].from_step} on, have" if several else ""
        which = which or f"the phase from step {late[0].from_step} has"
        listed = "leave batch_size_warmup out" if shorter is None else f"leave {'them' if several else 'it'} out"
        problems.append(
            f"batch_size_warmup: {which} no effect, because total_steps is {total_steps}; {listed}, and set batch_size "
            f"to {size}"
        )
    divided = (phase for phase in phases if phase.batch_size != batch_size)
    return problems + [
        problem for phase in divided if (problem := division_problem(phase, micro_batch_size, 1, reproducible))
    ]


def _order_problems(phases: Sequence[BatchPhase]) -> list[str]:
    """Return a sentence for each phase that does not come after the one before it, or that has no larger batch."""
    problems = []
    for phase, following in itertools.pairwise(phases):
        if following.from_step <= phase.from_step:
            problems.append(
                f"batch_size_warmup: the phase from step {following.from_step} comes after the one from step "
                f"{phase.from_step}; list the phases in the order of their steps, each step once"
            )
        elif following.batch_size <= phase.batch_size:
            problems.append(
                f"batch_size_warmup: {following.batch_size} from step {following.from_step} on is not more than "
                f"{phase.batch_size} from step {phase.from_step} on, but batches grow in a warm-up; give larger "
                "sizes, or leave the phase out"
            )
    return problems


def division_problem(phase: BatchPhase, micro_batch_size: int | None, ranks: int, reproducible: bool) -> str:
    """Return why the batch of a phase cannot be divided among ranks, and which sizes can; "" if it can.

    micro_batch_size: None if each size that divides the batch will do.
    """
    size = micro_batch_size or 1
    if divides(phase.batch_size, size, ranks, reproducible and micro_batch_size is not None):
        return ""
    where = f"batch_size_warmup: {phase.batch_size} from step {phase.from_step} on"
    possible = " or ".join(map(str, nearest_batch_sizes(phase.batch_size, size, ranks, reproducible)))
    count, rest = divmod(phase.batch_size, size)
    if rest:
        return f"{where} is not a multiple of micro_batch_size {size}; possible: {possible}"
    if micro_batch_size:
        where += f" / micro_batch_size {size} = {count}"
    if count < ranks:
        kind = "micro-batches are" if micro_batch_size else "is"
        return f"{where} {kind} fewer than {ranks} ranks, and each rank needs one; possible: {possible}"
    return f"{where} is not a power of two, which reproducible = true requires; possible: {possible}"
