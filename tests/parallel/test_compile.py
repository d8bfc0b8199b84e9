"""Whether torch.compile is used: the same decision on every rank, and a reason where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.multiprocess


def settle_each(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[bool | None, str]]:
    """On a rank: return the value of `compile` in each case. Only the compiler of the last rank reports a problem."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.errors import ConfigError
    from tinytrain_dist.parallel import compile

    context, results = init_distributed("cpu"), []
    for compiler, settings in cases:
        compile.why_not_compile = lambda *_, reason=compiler: reason if context.rank else ""  # type: ignore[misc]
        config = TrainingConfig(vocab_size=1000, micro_batch_size=1, **settings)
        try:
            config, text = compile.resolve_compile(config, context)
            results.append((config.compile, text))
        except ConfigError as error:
            results.append((None, str(error)))
    return results


def test_compile_is_decided_for_all_ranks_and_reported() -> None:
    long, short = {"total_steps": 10**6}, {"total_steps": 10}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("", short),
        ("", long),
        ("no g++", long),
        ("no g++", short),
        ("no g++", {**long, "reproducible": True}),
        ("no g++", {**short, "compile": True}),
        ("", {**short, "compile": True}),
        ("no g++", {**long, "compile": False}),
    ]
    first, second = run_ranks(2, settle_each, cases)
    assert first == second, "all ranks decide the same"
    assert [compiled for compiled, _ in first] == [False, True, False, False, None, None, True, False]
    assert "no g++); continuing without it" in first[2][1]
    assert "compile: torch.compile does not work on" in first[4][1]
    assert "set compile = false" in first[5][1]
    assert first[0][1] == first[3][1] == first[7][1] == ""


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytrain_dist.parallel.compile import why_not_compile

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_not_compile(torch.device("cpu")) == "RuntimeError: no compiler"


def test_vector_instructions_are_tested_only_if_the_compiler_fails_without_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch._inductor.config as inductor

    from tinytrain_dist.parallel.compile import why_not_compile

    tried: list[bool | None] = []

    def for_old_compilers(function: Any) -> Any:
        tried.append(inductor.cpp.vec_isa_ok)
        if inductor.cpp.vec_isa_ok:
            raise RuntimeError("unrecognized option -mavx512f")
        return function

    monkeypatch.setattr(torch, "compile", for_old_compilers)
    with inductor.patch({"cpp.vec_isa_ok": None}):  # monkeypatch would remove the setting in the end
        assert why_not_compile(torch.device("cpu")) == ""
        assert tried == [True, None]
        assert why_not_compile(torch.device("meta")) == "", "only a CPU has them"
        assert tried == [True, None, None]
    with inductor.patch({"cpp.vec_isa_ok": False}):  # TORCHINDUCTOR_VEC_ISA_OK=0
        assert why_not_compile(torch.device("cpu")) == ""
        assert inductor.cpp.vec_isa_ok is False


def test_bits_are_not_left_to_a_compiler_that_skips_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytrain_dist.parallel import compile

    cpu = torch.device("cpu")
    for without, version, exact, refused in (
        (True, "2.12.1", True, True),
        (True, "2.13.0+cpu", True, False),
        (True, "2.12.1", False, False),
        (False, "2.12.1", True, False),
    ):
        monkeypatch.setattr(compile, "CPU_LACKS_BF16", without)
        monkeypatch.setattr(torch, "__version__", version)
        assert ("removes roundings" in compile.why_not_compile(cpu, exact)) == refused


def compile_deep_models(cases: list[tuple[str, str]]) -> list[int]:
    """On a rank: return how many graphs 12 blocks are compiled into, trained and evaluated, in each case.

    A case is activation_checkpointing and precision. The branches are those of a GPU, with grouped queries.
    """
    from tinytrain_dist.config.model_config import ModelConfig
    from tinytrain_dist.model.matmul import simulate_device
    from tinytrain_dist.model.transformer import TransformerLM
    from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing
    from tinytrain_dist.parallel.compile import apply_compile, compiled_graph_count

    sizes = ModelConfig(vocab_size=50, num_layers=12, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, context_len=16)
    ids, targets = torch.randint(0, 50, (2, 2, 16))
    counts = []
    for how, precision in cases:
        torch._dynamo.reset()
        model: Any = TransformerLM(sizes, precision=precision)  # type: ignore[arg-type]
        for block in model.model.layers:
            apply_activation_checkpointing(block, how)
        apply_compile(model, on_cuda=True)
        before = compiled_graph_count()
        with simulate_device("cuda"):
            for _ in range(2):
                model(ids, targets).backward()
            with torch.no_grad():
                model(ids, targets)
        counts.append(compiled_graph_count() - before)
    return counts


def test_deep_models_are_compiled_once_and_in_whole_graphs() -> None:
    cases = [("none", "bf16"), ("selective", "bf16"), ("block", "fp8")]
    (counts,) = run_ranks(1, compile_deep_models, cases, timeout_seconds=600)
    # block, norm and loss, with gradients and without; not one for each of the 12 blocks
    assert [count <= 6 for count in counts] == [True, True, True], counts
