"""Let models and processes end cleanly although gloo's threads still hold tensors; importing this registers it.

A thread of gloo releases the tensors of a collective after it has told the caller that the collective is done. If no
other native code holds such a tensor, the release also frees its Python object, for which the thread must take the GIL.
An interpreter that has begun its end refuses this by ending the thread. The stack then unwinds through a destructor
that allows no exception, so the process aborts with "terminate called without an active exception".

This is a fault of torch, and plain FSDP2 has it as well. It shows only if the thread is delayed until the interpreter
begins its end, as on a busy machine. `destroy_process_group` waits for the threads only if nothing else refers to the
group. FSDP, DDP and meshes do.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import weakref
from typing import Any

import torch

from tinytrain_dist.distributed.torch_internals import hold_in_native_code

_kept_groups: list[tuple[weakref.ref[Any], Any]] = []  # (model, its process group)


def keep_group(model: Any, group: Any) -> None:
    """Keep a process group at least until `model`, which DDP wraps, is gone.

    Otherwise the C++ part of DDP can hold the last reference to the group. It is freed with the GIL held, and then
    waits for gloo's threads, which may wait for the GIL. Python's reference is released without the GIL.
    """
    # Drop the groups of models that are gone. When a model is freed would be too early: its C++ part is freed later.
    _kept_groups[:] = [(kept_for, kept) for kept_for, kept in _kept_groups if kept_for() is not None]
    _kept_groups.append((weakref.ref(model), group))


def hold_all_tensors() -> None:
    """Give every tensor a native reference that is never released, so that no thread's release is the last.

    This does not wait, so it also covers collectives that nobody has waited for. The memory is returned when the
    process ends, which is next.
    """
    gc.unfreeze()  # get_objects leaves out what is frozen
    # issubclass, because isinstance may run code of lazy modules and proxies
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    holder = hold_in_native_code(tensors)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))  # the interpreter's end would release it too early


# Exit handlers run in the reverse order of registration. Registered on import, this one runs after those that users
# register later, which may still run collectives.
atexit.register(hold_all_tensors)
