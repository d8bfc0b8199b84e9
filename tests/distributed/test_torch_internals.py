"""Check that the wrappers of private torch functions work with the installed version."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tinytrain_dist.distributed import torch_internals, torchrun_internals


def set_timeout_of_group() -> list[str]:
    """On a rank: set another time-out; return errors and warnings, and check that a collective fails after it."""
    import warnings

    from tinytrain_dist.distributed.context import init_distributed

    context = init_distributed("cpu")
    group = dist.new_group(backend="gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_internals.set_group_timeout(group, timedelta(seconds=0.5))
    if context.rank == 1:
        return []
    try:
        dist.barrier(group)
    except RuntimeError as error:
        return [str(error)]
    return ["the barrier did not fail"]


@pytest.mark.multiprocess
def test_a_group_gets_another_timeout() -> None:
    (message,) = run_ranks(2, set_timeout_of_group)[0]
    assert "imed out" in message


def test_the_public_timeout_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(dist, "set_timeout", lambda *given: calls.append(given), raising=False)
    group: Any = object()
    torch_internals.set_group_timeout(group, timedelta(seconds=1))
    assert calls == [(timedelta(seconds=1), group)]


def record() -> bytes:
    """On a rank: return the flight record after one collective."""
    from tinytrain_dist.distributed.context import init_distributed

    init_distributed("cpu")
    dist.barrier()
    return torch_internals.flight_record()


@pytest.mark.multiprocess
def test_a_flight_record_has_collectives_on_gloo_in_any_build() -> None:
    found = json.loads(run_ranks(1, record, env={"TORCH_FR_BUFFER_SIZE": "2000"})[0])
    assert [entry["profiling_name"] for entry in found["entries"]] != []


@pytest.mark.parametrize("of_nccl", [b'{"version": "2"}', b'{"entries": [1]}'])
def test_a_flight_record_of_nccl_comes_first(of_nccl: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C import _distributed_c10d as c10d

    of_gloo = b'{"entries": []}'
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda *given: of_nccl, raising=False)
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda *given: of_gloo)
    assert torch_internals.flight_record() == (of_nccl if b"entries" in of_nccl else of_gloo)


def test_resizes_of_storages_are_reported_while_the_context_is_open() -> None:
    seen: list[int] = []
    tensor = torch.ones(4)
    with torch_internals.after_storage_resize(lambda storage, nbytes: seen.append(nbytes)):
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(16)
    tensor.untyped_storage().resize_(0)
    assert seen == [0, 16]


def test_a_fake_tensor_has_a_shape_only() -> None:
    with torch_internals.fake_tensor_mode():
        assert torch.empty(10**9, 10**6).shape == (10**9, 10**6)


def test_torchrun_ends_workers_through_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    calls: list[Any] = []
    monkeypatch.setattr(SubprocessContext, "_close", lambda *given: calls.append(given))  # restored after the test
    torchrun_internals.wrap_worker_close(lambda close: lambda *given: (calls.append("before"), close(*given))[1])
    SubprocessContext._close("context", "signal", 30)  # type: ignore[arg-type]
    assert calls == ["before", ("context", "signal", 30)]


def test_unknown_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Gather'"):
        torch_internals.Gather  # noqa: B018


def test_importing_the_context_imports_neither_fsdp_nor_the_compiler() -> None:
    code = (
        "import sys, tinytrain_dist.distributed.context\n"
        "print([name for name in ('torch.distributed.fsdp', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
