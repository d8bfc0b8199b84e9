"""benchmarks/context_parallel.py: both methods compute what one process does, and send the bytes of the formulas."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # also on ranks, which import the module to find `measure`
    return importlib.import_module("context_parallel")


@pytest.mark.multiprocess
def test_both_methods_compute_the_same_and_send_what_the_formulas_say(benchmark: Any) -> None:
    cases = [benchmark.Case(24, 4, 12, kv_heads, 4) for kv_heads in (12, 3, 1)]  # 3: cp does not divide it
    for rank in run_ranks(4, benchmark.measure, cases, 1):
        for case, turns in zip(cases, rank, strict=True):
            for method in benchmark.METHODS:
                assert turns[method].difference < 1e-5
                assert turns[method].sent_bytes == 2 * case.sent_bytes(method)  # forward and backward
                assert len(turns[method].seconds) == len(turns[method].exchange_seconds) == 1


@pytest.mark.multiprocess
def test_the_program_prints_a_row_for_each_case(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main("--contexts 16 --cp 2 --heads 4 --kv-heads 2 --head-width 4 --rounds 1".split())
    printed = capsys.readouterr().out
    assert "| 16 | 2 | 4 | 2 |" in printed
    assert "largest difference from one process" in printed


def test_wrong_results_fail_the_program(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {method: benchmark.Turns(1, 0.1, [1.0], [1.0]) for method in benchmark.METHODS}
    monkeypatch.setattr(benchmark, "run_ranks", lambda ranks, *_, **__: [[wrong]] * ranks)
    with pytest.raises(SystemExit, match="1"):
        benchmark.main("--contexts 16 --cp 2 --kv-heads 8".split())


def test_the_computed_table_compares_sizes_and_balance(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    # 2 ranks with 16,384 positions each and 32 heads of 128: 2 passes x 16,384 x 256 bytes x
    # (half of 2 x (32 + 8) heads = 336 MB; 2 x 8 heads = 134 MB). Kept are 32 + 2 x 8 heads of these positions, or
    # 32 heads of them and 2 x 8 heads of all
    benchmark.main(["--paper", "--kv-heads", "8"])
    printed = capsys.readouterr().out
    assert "| 8 | 2 | 32,768 | 2 | 336, 134 | 201, 268 |" in printed
    assert "| one document | cp 2: 1.00 | cp 4: 1.00 | cp 8: 1.00 |" in printed
    # pairs of the 4 chunks: 10, 26, 10, 10; one rank has the first and the last
    assert benchmark.imbalance(2, [8, 4, 4]) == pytest.approx((26 + 10) / 28)
