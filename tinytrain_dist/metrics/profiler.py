"""Trace some steps with torch's profiler, with phases as named ranges, and on a GPU write a memory snapshot.

Must not know what a phase does. Only a run with the setting `profile` creates a `StepProfiler`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tinytrain_dist.distributed.torch_internals import start_memory_history, start_profiler, write_memory_history


class StepProfiler:
    """Write a trace of some steps, in which each step and each phase is a named range.

    A PhaseTimer calls `enter` whenever a phase begins.
    """

    def __init__(self, steps: range, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        """Prepare to trace `steps` (as logged, counted from 1) into `folder`. say: prints a line for the user."""
        self._steps = steps
        self._folder = folder  # created when the trace is written
        self._device = device
        self._say = say
        self._profiler: profile | None = None  # set while steps are traced
        self._traced: list[int] = []  # the steps traced so far
        self._step_range = ExitStack()  # the named range of the step in progress
        self._phase_range = ExitStack()  # the named range of the phase in progress

    def enter(self, phase: str, step: int) -> None:
        """Begin a phase; the phase `data` begins the next step. step: number of completed steps."""
        self._phase_range.close()
        if phase == "data":
            self._begin_step(step + 1)
        if self._profiler is not None:
            self._phase_range.enter_context(record_function(phase))

    def close(self) -> None:
        """End the trace and write it, even if the last steps are missing."""
        self._phase_range.close()
        self._begin_step(0)  # never traced, because steps count from 1
        if not self._traced:
            self._say(f"profile: this process ran no step of {self._steps[0]}:{self._steps[-1]}, so it wrote no trace")

    def _begin_step(self, step: int) -> None:
        """End the range of the previous step. Then trace this step, or write the trace if it is complete."""
        self._step_range.close()
        if step not in self._steps:
            self._write()
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                start_memory_history()
            profiler = profile(activities=activities, record_shapes=True)
            start_profiler(profiler)
            self._profiler = profiler  # only now: one that has not started cannot be stopped
        self._traced.append(step)
        self._step_range.enter_context(record_function(f"ProfilerStep#{step}"))  # TensorBoard's plugin looks for it

    def _write(self) -> None:
        """Stop tracing and write the files, if any step was traced. A full disk loses the trace but not the run."""
        profiler = self._profiler
        self._profiler = None
        if profiler is None:
            return
        profiler.__exit__(None, None, None)
        path = self._folder / f"steps-{self._traced[0]}-{self._traced[-1]}.pt.trace.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            if self._device.type == "cuda":
                write_memory_history(str(path).replace(".pt.trace.json", ".memory.pickle"))
            self._say(f"profile: wrote {path}; open it at https://ui.perfetto.dev or in TensorBoard")
        except (OSError, RuntimeError) as error:
            self._say(f"profile: {path} cannot be written ({error}); training continues")
