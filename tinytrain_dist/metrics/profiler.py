"""Trace a few steps with torch's profiler: phases as named ranges, and on a GPU a snapshot of the memory.

Must not know what a phase does. Only a run that sets `profile` makes one of these.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class StepProfiler:
    """Follows a PhaseTimer and writes a trace of some steps; each step and each phase is a range with its name."""

    def __init__(self, steps: range, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        """Prepare to trace `steps` (numbers as logged, from 1) into `folder`; `say` prints one line about it."""
        self._steps = steps
        self._folder = folder  # made when there is something to write
        self._device = device
        self._say = say
        self._profiler: profile | None = None  # while steps are traced
        self._traced: list[int] = []  # steps so far
        self._step_range = ExitStack()  # the named range of the step in progress
        self._phase_range = ExitStack()  # and of its phase

    def enter(self, phase: str, step: int) -> None:
        """Begin a phase after so many completed steps; the phase `data` begins the next step."""
        self._phase_range.close()
        if phase == "data":
            self._begin_step(step + 1)
        if self._profiler is not None:
            self._phase_range.enter_context(record_function(phase))

    def close(self) -> None:
        """End the trace: what was traced is written even if the last steps are missing."""
        self._phase_range.close()
        self._begin_step(0)  # a step that is never traced
        if not self._traced:
            self._say(f"profile: no step of {self._steps[0]}:{self._steps[-1]} was made here, so there is no trace")

    def _begin_step(self, step: int) -> None:
        """End the range of the step before; trace this step, or write the trace if it is past the last one."""
        self._step_range.close()
        if step not in self._steps:
            self._write()
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=100_000)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.__enter__()
        self._traced.append(step)
        self._step_range.enter_context(record_function(f"ProfilerStep#{step}"))  # TensorBoard's plugin looks for it

    def _write(self) -> None:
        """Stop tracing and write the files, if steps were traced. A full disk costs the trace, not the run."""
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
                torch.cuda.memory._dump_snapshot(str(path).replace(".pt.trace.json", ".memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            self._say(f"profile: wrote {path}; open it at https://ui.perfetto.dev or in TensorBoard")
        except (OSError, RuntimeError) as error:
            self._say(f"profile: {path} cannot be written ({error}); training continues")
