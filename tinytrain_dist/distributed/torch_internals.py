"""Call the private and version-dependent parts of torch, which no other module may use.

Each docstring names the torch versions that have these parts. "2.11 to 2.15" means that the test suite passed on 2.11
and 2.15, and on 2.13, which `constraints.txt` pins. If a new torch version breaks something, fix it here.

Importing this module imports torch and nothing slower: FSDP, the compiler and torchrun are imported where they are
needed. The only private operations that other modules use are `torch._foreach_*`, on which torch's own optimizers are
built.

`torchrun_internals` does the same for torchrun.

Sections: memory of a GPU, process groups and stores, flight recorder, FSDP, compiler, simulation and memory.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # 2.11 to 2.15
from torch.utils._pytree import tree_leaves as tree_leaves  # 2.11 to 2.15

from tinytrain_dist.distributed.network import take_over_listener

Method = TypeVar("Method", bound=Callable[..., Any])
COMPILER = "torch._dynamo"  # the module that imports all of torch.compile's front end
EXPANDABLE_SEGMENTS = "expandable_segments:True"  # a value of PYTORCH_ALLOC_CONF

if TYPE_CHECKING:  # at run time __getattr__ imports them on first use: importing FSDP takes seconds
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather as AllGather
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter


def __getattr__(name: str) -> Any:
    """Return FSDP's base classes for custom communication, AllGather and ReduceScatter. Versions: 2.11 to 2.15."""
    if name not in ("AllGather", "ReduceScatter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch.distributed.fsdp._fully_shard import _fsdp_api

    return getattr(_fsdp_api, name)


# ---------------------------------------------------------------- memory of a GPU


def use_expandable_segments() -> None:
    """Let torch's allocator of GPU memory extend its segments, so that free memory does not end up in unusable pieces.

    Call this before memory is allocated. A value that the user has set under either name of the variable is kept.
    torch warns about the older name. It may have read the variable when it was imported, so it is also told by a call.
    Versions: _accelerator_setAllocatorSettings in 2.11 to 2.15.
    """
    if "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        return
    os.environ["PYTORCH_ALLOC_CONF"] = EXPANDABLE_SEGMENTS
    torch._C._accelerator_setAllocatorSettings(EXPANDABLE_SEGMENTS)


# ---------------------------------------------------------------- process groups and stores


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Change the time after which a collective of an existing group fails.

    Versions: the public torch.distributed.set_timeout since 2.14, where the private _set_pg_timeout warns that it is
    deprecated; _set_pg_timeout before.
    """
    public = getattr(dist, "set_timeout", None)
    if public is not None:
        public(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def all_gather_into(output: Tensor, input: Tensor | None, group: dist.ProcessGroup | None, async_op: bool) -> Any:
    """Gather equal inputs into one contiguous output; return a Work handle if `async_op`, else None.

    Versions: all_gather_single since 2.13, all_gather_into_tensor before.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, input, group=group, async_op=async_op)


def hold_in_native_code(tensors: list[Tensor]) -> Any:
    """Return an object that refers to `tensors` from native code, as autograd and collectives do; see `process_end`.

    Versions: ScriptList in 2.11 to 2.15.
    """
    return torch._C.ScriptList(tensors) if tensors else None


def in_process_store() -> Any:
    """Return a key-value store for a single process. Versions: HashStore in 2.11 to 2.15, without types."""
    return dist.HashStore()  # type: ignore[attr-defined]


def tcp_store(host: str, port: int, world_size: int | None, is_server: bool, timeout: timedelta) -> Any:
    """Connect to the key-value store at host:port, or serve it there. Does not wait for other ranks to connect.

    A server uses the listening socket of the port, if this process was given one.

    `multi_tenant`: a second store of this process on the same port shares the first one's server.
    Versions: TCPStore with multi_tenant in 2.11 to 2.15, without types.
    Errors: RuntimeError if the port cannot be used or reached.
    """
    listener = take_over_listener(port) if is_server else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        world_size,
        is_server,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener,
    )


def prefix_store(prefix: str, store: Any) -> Any:
    """Return a view of `store` whose keys start with `prefix`. Versions: PrefixStore in 2.11 to 2.15, without types."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def finished_work() -> Any:
    """Return a completed Work handle, boxed as c10d operators return it. Versions: FakeWork in 2.11 to 2.15."""
    from torch._C._distributed_c10d import FakeWork

    return FakeWork().boxed()


def init_fake_process_group(world_size: int) -> None:
    """Initialize torch.distributed as rank 0 of simulated ranks; collectives send nothing.

    Versions: the backend "fake" and FakeStore in 2.11 to 2.15.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def traceable_all_to_all(parts: Tensor, group_name: str) -> Tensor:
    """Send part i of dim 0 to rank i of a group, and return the parts that arrive; torch.compile can trace it.

    `group_name`: ProcessGroup.group_name. Gradients do not pass. A collective; blocks on a CPU.
    Versions: the operators _c10d_functional in 2.11 to 2.15; run on 2.13.
    """
    functional = torch.ops._c10d_functional
    sizes = [1] * parts.shape[0]
    received: Tensor = functional.wait_tensor(
        functional.all_to_all_single(parts.contiguous(), sizes, sizes, group_name)
    )
    return received


def functional_group_ranks(group_name: str) -> tuple[int, ...]:
    """Return the ranks of the group that an operator of _c10d_functional names. Versions: 2.11 to 2.15; run on 2.13."""
    resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009 - not exported, for mypy
    return tuple(dist.get_process_group_ranks(resolve(group_name)))


# ---------------------------------------------------------------- flight recorder


def enable_flight_recorder(folder: Path) -> None:
    """Make torch record the last 2000 collectives, and write them to `folder` when one times out on NCCL.

    Sets environment variables that are not set yet; takes effect on process groups made afterwards.
    Versions: these variables in 2.11 to 2.15.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_trace_rank_"))


def flight_record() -> bytes:
    """Return the last collectives of this rank as JSON, to show where a run hangs; without entries if torch has none.

    Versions: _dump_fr_trace_json, for gloo, in 2.11 to 2.15. _dump_nccl_trace_json in builds with NCCL, for NCCL alone.
    """
    from torch._C import _distributed_c10d as c10d

    include_collectives, only_active = True, False
    if hasattr(c10d, "_dump_nccl_trace_json"):
        of_nccl = bytes(c10d._dump_nccl_trace_json(include_collectives, only_active))
        if b'"entries"' in of_nccl:
            return of_nccl
    return bytes(c10d._dump_fr_trace_json(include_collectives, only_active))  # type: ignore[attr-defined]


# ---------------------------------------------------------------- FSDP


def unshard_asynchronously(unit: Any) -> None:
    """Make an FSDP unit gather its weights in the background, and wait for them only where they are used.

    For units with explicit prefetching. Without this call, gathering does not overlap with computation.
    Versions: FSDPModule._set_unshard_async_op in 2.11 to 2.15.
    """
    unit._set_unshard_async_op(True)


_reduce_scatter_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by the group of shards


def with_local_part(tensor: Any, local: Tensor) -> Tensor:
    """Return a DTensor with the sharding of another one and this local part, which may be on another device.

    `DTensor.from_local` would move it to the device of the mesh. Versions: 2.11 to 2.15.
    """
    from torch.distributed.tensor import DTensor

    return DTensor(local, tensor._spec, requires_grad=False)


def separate_reduce_scatters(model: Any, timeout: timedelta | None) -> bool:
    """Let FSDP reduce-scatter in a process group of its own, beside the all-gathers. A collective of a replica's ranks.

    Otherwise one communicator of NCCL runs both kinds one after the other. Models over the same ranks share the group,
    so that building a model again takes no more memory. Returns whether this torch can do it.
    Versions: FSDPModule.set_separate_reduce_scatter_group since 2.13, with mesh_info.reduce_scatter_process_group.
    """
    if not hasattr(model, "set_separate_reduce_scatter_group"):
        return False
    units = [module for module in model.modules() if hasattr(module, "set_separate_reduce_scatter_group")]
    meshes = [group.mesh_info for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    shards = meshes[0].shard_process_group
    for mesh in meshes:
        mesh.reduce_scatter_process_group = _reduce_scatter_groups.get(shards)
    model.set_separate_reduce_scatter_group(True)
    group = _reduce_scatter_groups[shards] = meshes[0].reduce_scatter_process_group
    if timeout is not None:
        set_group_timeout(group, timeout)
    return True


# ---------------------------------------------------------------- compiler


def without_loading_compiler(method: Method) -> Method:
    """Return a method that torch hides from its compiler, without importing the compiler for that.

    The first call of such a method imports the compiler, which takes as long as importing torch, also in a program
    that compiles nothing. Here the method is called directly while the compiler is not imported.
    Versions: torch._disable_dynamo keeps the method in __wrapped__ in 2.11 to 2.15; other methods are returned as
    they are.
    """
    plain = getattr(method, "__wrapped__", None)
    if plain is None:
        return method

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if COMPILER in sys.modules else plain)(*args, **kwargs)

    return cast(Method, call)


def replicate_without_compiler(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a model that is not compiled for DDP, without importing the compiler; options: of DistributedDataParallel.

    DDP asks the compiler how to split graphs, and hides part of its forward from it. Without graphs, neither has an
    effect. Versions: torch._dynamo.utils.get_optimize_ddp_mode and _run_ddp_forward in 2.11 to 2.15. If DDP asks for
    anything else, or the compiler is imported already, this is plain DDP.
    """
    if COMPILER in sys.modules:
        return DistributedDataParallel(model, **options)
    wrapped: DistributedDataParallel | None = None
    answers: Any = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: "no_optimization"))
    torch._dynamo = answers
    try:
        with suppress(AttributeError):
            wrapped = DistributedDataParallel(model, **options)
    finally:
        if torch._dynamo is answers:  # otherwise another thread has imported the compiler
            del torch._dynamo
    if wrapped is None:
        return DistributedDataParallel(model, **options)
    wrapped._run_ddp_forward = functools.partial(model)  # type: ignore[method-assign]
    return wrapped


def compiled_graph_count() -> int:
    """Return how many graphs torch.compile has compiled in this process. A step that compiles one waits for it.

    Versions: dynamo's counters in 2.11 to 2.15.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported before a program uses the compiler
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def keep_graphs_whole_under_ddp() -> None:
    """Stop torch.compile from splitting graphs at DDP's buckets. Versions: dynamo's optimize_ddp in 2.11 to 2.15."""
    import torch._dynamo

    torch._dynamo.config.optimize_ddp = False


@contextmanager
def without_compiled_calls(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Call modules as they are while the block runs, also those that `Module.compile` has compiled.

    Versions: `Module._compiled_call_impl` in 2.11 to 2.15.
    """
    compiled = [module._compiled_call_impl for module in modules]
    for module in modules:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(modules, compiled, strict=True):
            module._compiled_call_impl = call


def wrap_calls(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Let `module(...)` call `wrapper(call, ...)`, where `call` runs the module's hooks and forward, compiled or not.

    To be called after `Module.compile`. Versions: `Module._compiled_call_impl` in 2.11 to 2.15.
    """
    call = module._compiled_call_impl or module._call_impl
    module._compiled_call_impl = functools.partial(wrapper, call)


def assume_vector_instructions() -> bool:
    """Let inductor use the vector instructions that this processor lists, without a test; return whether that is new.

    The test starts up to six processes in each rank, one after the other. They take 0.9 s of processor time even if
    the test programs are in the cache. Call this before anything is compiled; try the compiler afterwards, and if it
    fails call `check_vector_instructions`. A value that the user has set with TORCHINDUCTOR_VEC_ISA_OK is kept.
    Versions: inductor's cpp.vec_isa_ok in 2.11 to 2.15.
    """
    import torch._inductor.config as inductor

    if getattr(inductor.cpp, "vec_isa_ok", True) is not None:
        return False
    inductor.cpp.vec_isa_ok = True
    return True


def check_vector_instructions() -> None:
    """Undo `assume_vector_instructions`, and forget what was compiled. Versions: as there."""
    import torch._dynamo
    import torch._inductor.config as inductor
    from torch._inductor import cpu_vec_isa

    inductor.cpp.vec_isa_ok = None
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    torch._dynamo.reset()


def use_deterministic_kernels(compiles: bool) -> None:
    """Do what torch.use_deterministic_algorithms(True) does, without importing the compiler in a run that has no use.

    That import takes as long as the one of torch, in every start of a reproducible run. compiles: whether the run uses
    torch.compile. If the compiler is imported later after all, it reads the variable.
    Versions: torch._C._set_deterministic_algorithms in 2.11 to 2.15.
    """
    if compiles or "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(True)
        return
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch._C._set_deterministic_algorithms(True, warn_only=False)


def emulate_eager_rounding() -> None:
    """Make compiled kernels round to bf16 wherever eager mode does, even inside a fused kernel.

    Versions: inductor's emulate_precision_casts in 2.11 to 2.15; see `compiler_keeps_bf16_rounding`.
    """
    import torch._inductor.config as inductor

    inductor.emulate_precision_casts = True


def compiler_keeps_bf16_rounding() -> bool:
    """Return whether `emulate_eager_rounding` also keeps casts of weights to bf16 and back.

    Versions: since 2.13. Before that, inductor removes such pairs of casts (joint_graph.py, pointless_convert).
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 13)


def prefer_attention_kernels(*names: str) -> None:
    """Make scaled_dot_product_attention try these kernels in this order, and no others, from now on.

    names: of torch.nn.attention.SDPBackend. The public sdpa_kernel sets the same flags, but only inside a `with`, which
    compiled blocks would have to enter one by one. Versions: _sdpa_kernel with set_priority in 2.11 to 2.15.
    """
    from torch.nn import attention

    attention._sdpa_kernel([getattr(attention.SDPBackend, name) for name in names], set_priority=True)


def fused_attention_ops() -> set[Any]:
    """Return the operators of attention: those that scaled_dot_product_attention may choose, and FlexAttention.

    Versions: all of them in 2.11 to 2.15.
    """
    aten = torch.ops.aten
    return {
        torch.ops.higher_order.flex_attention,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
    }


def float8_matmul_ops() -> set[Any]:
    """Return the operators that multiply float8 matrices. Versions: _scaled_mm in 2.11 to 2.15, on CPU and CUDA."""
    return {torch.ops.aten._scaled_mm.default}


# ---------------------------------------------------------------- simulation and memory


def fake_tensor_mode() -> Any:
    """Return a context manager in which tensors have shapes but no memory. Versions: FakeTensorMode in 2.11 to 2.15.

    The first call takes a second for the import.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def after_storage_resize(callback: Callable[[Any, int], None]) -> Iterator[None]:
    """Call `callback(storage, nbytes)` after each UntypedStorage.resize_, with which FSDP frees and allocates weights.

    Dispatch modes do not intercept this method, so it is replaced while the context is open. Versions: 2.11 to 2.15.
    """
    original = torch.UntypedStorage.resize_

    def resize_and_report(storage: Any, nbytes: int) -> Any:
        result = original(storage, nbytes)
        callback(storage, nbytes)
        return result

    torch.UntypedStorage.resize_ = resize_and_report  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


def start_profiler(profiler: Any) -> None:
    """Enter a torch.profiler.profile without its warning about later cycles, which a single trace does not have.

    Versions: 2.11 gives this warning at the first start, newer ones only from the second cycle on.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        profiler.__enter__()


def start_memory_history(max_entries: int = 100_000) -> None:
    """Record every allocation on the GPU with its stack. Versions: _record_memory_history in 2.11 to 2.15."""
    torch.cuda.memory._record_memory_history(max_entries=max_entries)


def write_memory_history(path: str) -> None:
    """Write what `start_memory_history` recorded, for https://pytorch.org/memory_viz, and stop recording.

    Versions: _dump_snapshot in 2.11 to 2.15. Errors: OSError if the file cannot be written; then recording continues.
    """
    torch.cuda.memory._dump_snapshot(path)
    torch.cuda.memory._record_memory_history(enabled=None)
