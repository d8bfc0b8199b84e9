"""What only a GPU can show: no step waits for it, memory is as planned, bits are kept, and copies are pinned.

Skipped as one where there is no GPU. TINYTRAIN_TEST_DEVICE=cpu runs the same code on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import runs
from tests.cuda.runs import DEVICE, Failed
from tests.helpers.ranks import run_ranks

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU; TINYTRAIN_TEST_DEVICE=cpu tries the tests without one", allow_module_level=True)

pytestmark = pytest.mark.cuda

FASTEST = [
    runs.eager_steps_wait,
    runs.sharded_steps_wait,
    runs.compiled_steps_wait,
    runs.masked_steps_wait,
    runs.compiled_masked_steps_wait,
    runs.offloaded_steps_wait,
    runs.compiled_offloaded_steps_wait,
    runs.within_documents,
    runs.eager_memory,
    runs.offloaded_memory,
    runs.compiled_memory,
    runs.losses_by_mode,
    runs.losses_compiled,
    runs.copies_on_the_host,
    runs.grouped_and_repeated,
    runs.losses_of_head,
]


def fp8_exists() -> bool:
    from typing import get_args, get_type_hints

    from tinytrain_dist.config.schema import TrainingConfig

    return "fp8" in get_args(get_type_hints(TrainingConfig)["precision"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def fastest(folder: Path) -> dict[str, Any]:
    """The results of one process that uses the fastest kernels."""
    parts = [*FASTEST, *([runs.losses_fp8] if fp8_exists() else [])]
    return dict(run_ranks(1, runs.run_parts, parts, folder, timeout_seconds=300)[0])


@pytest.fixture(scope="module")
def reproducible(folder: Path) -> dict[str, Any]:
    """The results of one process in reproducible mode."""
    parts = [runs.reproducible_digests, runs.reproducible_masked_digests, runs.losses_in_float32]
    return dict(run_ranks(1, runs.run_parts, parts, folder, timeout_seconds=200)[0])


def result(found: dict[str, Any], part: Any) -> Any:
    """What the part returned; its error is this test's failure."""
    value = found[part.__name__]
    assert not isinstance(value, Failed), value.text
    return value


@pytest.mark.parametrize(
    "part",
    [
        runs.eager_steps_wait,
        runs.sharded_steps_wait,
        runs.compiled_steps_wait,
        runs.masked_steps_wait,
        runs.compiled_masked_steps_wait,
        runs.offloaded_steps_wait,
        runs.compiled_offloaded_steps_wait,
    ],
    ids=lambda part: part.__name__,
)
def test_no_step_waits_for_the_gpu(fastest: dict[str, Any], part: Any) -> None:
    assert result(fastest, part) == "done"


@pytest.mark.parametrize("part", [runs.eager_memory, runs.offloaded_memory], ids=lambda part: part.__name__)
def test_an_eager_step_takes_the_planned_memory(fastest: dict[str, Any], part: Any) -> None:
    measured, predicted, moment = result(fastest, part)
    assert 0.9 < predicted / measured < 1.1, f"predicted {predicted:,} bytes at {moment}, measured {measured:,}"


def test_a_compiled_step_takes_at_most_the_planned_memory(fastest: dict[str, Any]) -> None:
    measured, predicted, moment = result(fastest, runs.compiled_memory)
    assert predicted / measured > 0.9, f"predicted {predicted:,} bytes at {moment}, measured {measured:,}"


def test_all_modes_on_one_rank_learn_the_same(fastest: dict[str, Any]) -> None:
    by_mode = result(fastest, runs.losses_by_mode)
    assert len(by_mode["none"]) == runs.SMALL["total_steps"]
    assert by_mode["none"][-1] < by_mode["none"][0]
    for mode in ("ddp", "fsdp"):
        assert by_mode[mode] == pytest.approx(by_mode["none"], rel=5e-3), mode


def test_a_compiled_run_learns_the_same(fastest: dict[str, Any]) -> None:
    expected = result(fastest, runs.losses_by_mode)["none"]
    assert result(fastest, runs.losses_compiled) == pytest.approx(expected, rel=1e-2)


@pytest.mark.skipif(not fp8_exists(), reason="this version has no precision = fp8")
def test_a_run_in_fp8_learns_almost_the_same(fastest: dict[str, Any]) -> None:
    expected = result(fastest, runs.losses_by_mode)["none"]
    assert result(fastest, runs.losses_fp8) == pytest.approx(expected, rel=3e-2)


def test_copies_for_a_save_are_pinned_and_equal(fastest: dict[str, Any]) -> None:
    found = result(fastest, runs.copies_on_the_host)
    assert found == dict.fromkeys(["0.weight", "0.bias", "1.weight", "1.bias"], (DEVICE == "cuda", True))


def test_grouped_heads_equal_repeated_ones(fastest: dict[str, Any]) -> None:
    for name, (grouped, repeated) in result(fastest, runs.grouped_and_repeated).items():
        deviation = float((grouped - repeated).norm() / repeated.norm())
        assert deviation < 0.02, f"{name}: {deviation}"


def test_loss_in_chunks_equals_the_plain_one(fastest: dict[str, Any]) -> None:
    for name, deviations in result(fastest, runs.losses_of_head).items():
        # in bf16 each logit and each gradient is rounded to 8 bits; float32 products may be computed in TF32
        limits = (1e-3, 2e-2, 2e-2) if name.startswith("bfloat16") else (1e-3, 5e-3, 5e-3)
        assert all(got < limit for got, limit in zip(deviations, limits, strict=True)), f"{name}: {deviations}"


def test_documents_packed_into_windows_learn_as_on_the_cpu(fastest: dict[str, Any]) -> None:
    for name, (on_device, on_cpu) in result(fastest, runs.within_documents).items():
        deviation = float((on_device - on_cpu).norm() / on_cpu.norm())
        assert deviation < 5e-3, f"{name}: {deviation}"  # products may be computed in TF32


@pytest.mark.parametrize("part", [runs.reproducible_digests, runs.reproducible_masked_digests])
def test_reproducible_runs_have_equal_bits(reproducible: dict[str, Any], part: Any) -> None:
    found = result(reproducible, part)
    assert found["once"]
    for name in found.keys() - {"once"}:
        differing = [tensor for tensor, digest in found["once"].items() if found[name].get(tensor) != digest]
        assert not differing, f"{name}: {len(differing)} of {len(found['once'])} tensors differ, as {differing[:4]}"


def test_a_killed_run_resumes_with_equal_bits(reproducible: dict[str, Any], folder: Path) -> None:
    expected = result(reproducible, runs.reproducible_digests)["once"]
    with pytest.raises(AssertionError, match=r"SIGKILL|signal 9|-9"):
        run_ranks(1, runs.die_after_a_save, folder)
    (found,) = run_ranks(1, runs.run_parts, [runs.resume_after_the_kill], folder)
    assert result(found, runs.resume_after_the_kill) == expected


def test_a_run_on_the_gpu_learns_as_on_the_cpu(reproducible: dict[str, Any], folder: Path) -> None:
    on_gpu = result(reproducible, runs.losses_in_float32)
    (on_cpu,) = run_ranks(1, runs.losses_on_the_cpu, folder)
    assert len(on_cpu) == runs.SMALL["total_steps"]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
