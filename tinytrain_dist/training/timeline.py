"""Simulate when tasks run that wait for each other, in queues and on shared links: the timeline of a step.

* A queue runs its tasks one after the other, in the order in which they were added. It stands for a stream of a GPU or
  for a communicator of NCCL.
* A task starts when its queue is free and all tasks that it waits for have ended. It first waits for its latency, and
  then transfers. Transfers that use the same link at the same time share it equally.

Must not know models, collectives or torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """Work in a queue. Without a link, it takes `latency + seconds`, whatever else runs."""

    name: str
    queue: str
    seconds: float = 0.0  # of the work itself, if the link is not shared
    after: tuple[int, ...] = ()  # numbers of the tasks that must have ended
    latency: float = 0.0  # seconds before the work begins
    link: str = ""


@dataclass(frozen=True)
class Span:
    """When a task ran, in seconds since the first task could start."""

    start: float
    end: float


@dataclass
class _Running:
    start: float
    latency: float
    work: float


@dataclass
class Timeline:
    """Tasks, in the order in which they are issued. `add` returns a task's number."""

    tasks: list[Task] = field(default_factory=list)

    def add(self, task: Task) -> int:
        """Append a task, and return its number, for `after` of later tasks."""
        assert all(0 <= number < len(self.tasks) for number in task.after), f"{task.name} waits for a later task"
        self.tasks.append(task)
        return len(self.tasks) - 1

    def run(self) -> list[Span]:
        """Simulate all tasks, and return when each ran."""
        queues: dict[str, deque[int]] = {}
        for number, task in enumerate(self.tasks):
            queues.setdefault(task.queue, deque()).append(number)
        spans: dict[int, Span] = {}
        running: dict[int, _Running] = {}
        now = 0.0
        while len(spans) < len(self.tasks):
            for queue in queues.values():
                head = queue[0] if queue else None
                if head is not None and head not in running and all(other in spans for other in self.tasks[head].after):
                    running[head] = _Running(now, self.tasks[head].latency, self.tasks[head].seconds)
            now += self._advance(running)
            for number in [number for number, each in running.items() if each.latency <= 0 and each.work <= 0]:
                spans[number] = Span(running.pop(number).start, now)
                queues[self.tasks[number].queue].popleft()
        return [spans[number] for number in range(len(self.tasks))]

    def _advance(self, running: dict[int, _Running]) -> float:
        """Let the running tasks work until the first of them ends its latency or its work; return how long that is."""
        assert running, "tasks wait for tasks behind them in the same queue"
        sharing: dict[str, int] = {}
        for number, each in running.items():
            if each.latency <= 0:
                sharing[self.tasks[number].link] = sharing.get(self.tasks[number].link, 0) + 1

        def slowdown(number: int) -> int:
            return sharing[self.tasks[number].link] if self.tasks[number].link else 1

        def left(number: int) -> float:
            each = running[number]
            return each.latency if each.latency > 0 else each.work * slowdown(number)

        remaining = {number: left(number) for number in running}
        elapsed = min(remaining.values())
        for number, each in running.items():
            done = remaining[number] <= elapsed  # exactly 0 then, whatever rounding would leave
            if each.latency > 0:
                each.latency = 0.0 if done else each.latency - elapsed
            else:
                each.work = 0.0 if done else each.work - elapsed / slowdown(number)
        return elapsed


def waiting(timeline: Timeline, spans: list[Span], queue: str) -> dict[str, float]:
    """Return for how long a queue waited for tasks of other queues, by the name of the task it waited for last.

    The time after its last task, until all tasks have ended, counts as waiting for the last task that ends.
    """
    waited: dict[str, float] = {}
    free_at = 0.0
    for number, task in enumerate(timeline.tasks):
        if task.queue != queue:
            continue
        gap = spans[number].start - free_at
        if gap > 0:
            latest = max(task.after, key=lambda other: spans[other].end)
            name = timeline.tasks[latest].name
            waited[name] = waited.get(name, 0.0) + gap
        free_at = spans[number].end
    last = max(range(len(spans)), key=lambda number: spans[number].end, default=None)
    if last is not None and spans[last].end > free_at:
        name = timeline.tasks[last].name
        waited[name] = waited.get(name, 0.0) + spans[last].end - free_at
    return waited
