"""A process with an own loop ends cleanly, although a thread of gloo releases a tensor while the interpreter ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

SECONDS = 25
SCRIPT = """
import atexit, ctypes, os, sys

rank, meeting_point = int(sys.argv[1]), sys.argv[2]

@atexit.register  # before the library is imported, so it runs last
def wait_with_the_gil():
    if rank == 0:
        os.write(1, b"ending\\n")
        # PyDLL keeps the GIL, so the thread that releases the tensor waits for it until the interpreter begins its end
        ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)

class Output:
    '''The interpreter flushes sys.stdout once more after it has begun its end. Then let that thread have the GIL.'''
    def flush(self):
        if sys.is_finalizing():
            os.write(1, b"ended\\n")
            os.read(0, 1)

import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from tinytrain_dist import AdamW, apply_fsdp, clip_gradients

dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
model = apply_fsdp(nn.Linear(4, 4), init_device_mesh("cpu", (2,)))
optimizer = AdamW(model.parameters(), 0.1)
model(torch.ones(2, 4)).sum().backward()
clip_gradients(model.parameters(), 1.0)
optimizer.step()
group = dist.group.WORLD  # keeps the group's threads, as the mesh in `model` does
if rank == 0:
    dist.all_reduce(torch.ones(4), async_op=True)  # a thread waits for rank 1, and then releases the tensor
    sys.stdout = Output()
    sys.setswitchinterval(1000)  # no thread gets the GIL unless the main thread waits without it
else:
    os.read(0, 1)
    dist.all_reduce(torch.ones(4))
dist.destroy_process_group()
"""


def start(rank: int, folder: Path, script: str = SCRIPT) -> subprocess.Popen[bytes]:
    """Start a rank that waits for a byte: rank 0 at its end, rank 1 before the sum that completes that of rank 0."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(folder / "meeting_point")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback},
        )


def let_go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # if it has ended, its exit code says how
        process.stdin.write(b"1")
        process.stdin.flush()


def test_a_collective_may_finish_while_the_interpreter_ends(tmp_path: Path) -> None:
    ranks = [start(rank, tmp_path) for rank in range(2)]
    try:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == b"ending\n", (tmp_path / "rank0.log").read_text()
        let_go_on(ranks[1])
        assert ranks[1].wait(SECONDS) == 0, (tmp_path / "rank1.log").read_text()
        let_go_on(ranks[0])
        ranks[0].stdout.readline()
        let_go_on(ranks[0])
        assert ranks[0].wait(SECONDS) == 0, (tmp_path / "rank0.log").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# A collective is pending when the model is freed. Freeing the last reference to its group would wait for the thread of
# gloo that runs the collective, and hold the GIL, for which the thread waits at its end.
FREES_THE_MODEL = f"""
import faulthandler, os, sys
import torch, torch.distributed as dist
from torch import nn
from tinytrain_dist import apply_ddp

faulthandler.dump_traceback_later({SECONDS}, exit=True)  # needs no GIL
rank, meeting_point = int(sys.argv[1]), sys.argv[2]

def train():
    model = apply_ddp(nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    if rank == 0:
        dist.all_reduce(torch.ones(4), async_op=True)
        dist.destroy_process_group()

dist.init_process_group("gloo", init_method=f"file://{{meeting_point}}", rank=rank, world_size=2)
train()
if rank == 0:
    os.write(1, b"freed\\n")
os.read(0, 1)
if rank == 1:
    dist.all_reduce(torch.ones(4))
    dist.destroy_process_group()
"""


def test_freeing_a_model_with_ddp_waits_for_no_collective(tmp_path: Path) -> None:
    ranks = [start(rank, tmp_path, FREES_THE_MODEL) for rank in range(2)]
    try:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == b"freed\n", (tmp_path / "rank0.log").read_text()
        for rank in (1, 0):
            let_go_on(ranks[rank])
            assert ranks[rank].wait(SECONDS) == 0, (tmp_path / f"rank{rank}.log").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
