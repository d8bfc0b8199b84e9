"""Which stages there are, in which order, and how long each may take. Imports no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import get_args, get_type_hints


@dataclass(frozen=True)
class Case:
    """What one training stage trains."""

    size: str  # of compare.SIZES
    system: str  # of compare.RUNNERS
    precision: str
    batch: int  # sequences per pass of one rank
    accumulation: int = 1
    steps: int = 12
    ranks: int = 1


@dataclass(frozen=True)
class Entry:
    """One stage. seconds: what it is expected to take on an H100; it is ended after twice as many."""

    name: str  # GROUP or GROUP:DETAIL; --stages takes either
    seconds: float
    function: str  # MODULE.FUNCTION in gpu_stages
    case: Case | None = None
    unavailable: str = ""  # why it cannot run here; "" if it can

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


PASSES = {"tiny": 4, "124m": 32, "350m": 16, "1b": 8}  # sequences at once: 16,384 or 32,768 tokens


def fp8_exists() -> bool:
    """Return whether `precision = fp8` is a value that TrainingConfig takes."""
    from tinytrain_dist.config.schema import TrainingConfig

    return "fp8" in get_args(get_type_hints(TrainingConfig)["precision"])


def entries(dry: bool, gpus: int) -> list[Entry]:
    """Return all stages in the order in which they run."""
    found = [
        Entry("environment", 20, "machine.environment"),
        Entry("tests", 100, "machine.tests"),
        Entry("ceilings", 25, "kernels.ceilings"),
        Entry("loss", 40, "kernels.loss"),
        Entry("attention", 25, "kernels.attention"),
        Entry("optimizer", 25, "kernels.optimizer"),
        Entry("reduction", 20, "kernels.reduction"),
    ]
    large, middle = ("tiny", "tiny") if dry else ("1b", "350m")
    cases = _dry_cases() if dry else _cases()
    for case in cases[:2] if dry else cases[:5]:
        found.append(_training("end_to_end", case))
    profiled = Case(large, "ours-eager" if dry else "ours", "bf16", PASSES[large])
    found.append(Entry(f"profile:{large}", 45, "training.profile", profiled))
    for size, seconds in ((middle, 45), (large, 75))[1 if dry else 0 :]:
        saved = Case(size, "ours-eager" if dry else "ours", "bf16", PASSES[size], steps=2 if dry else 6)
        found.append(Entry(f"save:{size}", seconds, "training.save", saved))
    for case in cases[2 if dry else 5 :]:
        found.append(_training("end_to_end", case))
    return [*found, *_scaling(dry, gpus, large)]


def _cases() -> list[Case]:
    cases = [
        Case("1b", "ours", "bf16", 8),
        Case("1b", "compiled", "bf16", 8),
        Case("1b", "ours", "fp8", 8),
        Case("1b", "hf", "bf16", 8),
        Case("1b", "ours", "bf16", 8, accumulation=4, steps=5),
        # from here on after profile and save
        Case("1b", "ours", "bf16", 16),
        Case("1b", "hf-compiled", "bf16", 8),
        Case("1b", "ours", "fp8", 8, accumulation=4, steps=5),
        Case("1b", "compiled", "bf16", 8, accumulation=4, steps=5),
    ]
    for size in ("350m", "124m"):
        for system, precision in (("ours", "bf16"), ("compiled", "bf16"), ("ours", "fp8"), ("hf", "bf16")):
            cases.append(Case(size, system, precision, PASSES[size], steps=20))
    return cases


def _dry_cases() -> list[Case]:
    systems = (("ours-eager", "fp32"), ("loop", "fp32"), ("hf", "fp32"), ("ours-eager", "fp8"))
    return [Case("tiny", system, precision, 4, steps=3) for system, precision in systems]


def _training(group: str, case: Case) -> Entry:
    missing: list[str] = []
    if not case.system.startswith("ours"):
        needed = ("transformers", "accelerate") if case.system.startswith("hf") else ("transformers",)
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
    why = f"{' and '.join(missing)} is not installed" if missing else ""
    if case.precision == "fp8" and not fp8_exists():
        why = "this version has no precision = fp8"
    name = f"{group}:{case.size}:{case.system}:{case.precision}:{case.batch}x{case.accumulation}"
    return Entry(name, 40, "training.end_to_end", case, why)


def _scaling(dry: bool, gpus: int, size: str) -> list[Entry]:
    ranks = 2 if dry else gpus
    if ranks < 2:
        return [Entry("scaling", 0, "training.end_to_end", unavailable="this machine has one GPU")]
    systems = ["ours-eager" if dry else "ours", "ours-fsdp", *(["ours-hsdp"] if ranks >= 4 and ranks % 2 == 0 else [])]
    steps = 3 if dry else 12
    precision = "fp32" if dry else "bf16"
    cases = [Case(size, system, precision, PASSES[size], steps=steps, ranks=ranks) for system in systems]
    return [Entry(f"scaling:{size}:{case.system}:{ranks}", 70, "training.end_to_end", case) for case in cases]
