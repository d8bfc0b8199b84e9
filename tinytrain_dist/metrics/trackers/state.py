"""Keep what a tracker needs to continue its run after a resume: the run's ID, and the last steps that were sent.

Must not know any tracking service.
"""

from __future__ import annotations

from tinytrain_dist.config.run_folder import TRACKER_STATE_FILE
from tinytrain_dist.metrics.trackers.base import TrackedRun
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically
from tinytrain_dist.utils.json_files import is_whole_number


class TrackerState:
    """What a tracker keeps in its folder for a resume: the ID of its run, and which steps it has sent.

    A run that resumes from an earlier step computes some steps again. Services that cannot replace a point would show
    them twice, so `unsent` leaves them out: such a service keeps the first value of a step.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Read the state of the tracker's earlier run, if there is one and this run continues it."""
        self._path = run.folder / TRACKER_STATE_FILE
        state = {} if run.is_new else read_json_object(self._path)
        self.id = str(state.get("id") or "")
        self.service = str(state.get("service") or "")
        rows = state.get("rows")
        self._rows: int = rows if rows is not None and is_whole_number(rows) else 0
        steps = state.get("last_steps")
        steps = steps if self.id and isinstance(steps, dict) else {}
        # by group: training and evaluation log different tags at the same step
        self._last_steps: dict[str, int] = {group: step for group, step in steps.items() if is_whole_number(step)}
        self._sent_before = dict(self._last_steps)

    @property
    def last_step(self) -> int:
        """The last step that an earlier process has sent; 0 if there is none."""
        return max(self._sent_before.values(), default=0)

    def begin(self, run_id: str, service: str = "") -> None:
        """Keep the ID of the tracker's run. service: where the run is. Another run or service begins without steps."""
        if (run_id, service) != (self.id, self.service):
            self._last_steps, self._sent_before, self._rows = {}, {}, 0
        self.id, self.service = run_id, service
        self._write()

    def unsent(self, step: int, numbers: dict[str, float]) -> dict[str, float]:
        """Return the numbers that no earlier process has sent for this step, and remember that they are sent."""
        new = {tag: value for tag, value in numbers.items() if step > self._sent_before.get(_group(tag), -1)}
        self._last_steps.update({_group(tag): step for tag in new})
        if new:
            self._write()
        return new

    def next_row(self) -> int:
        """Return 0, 1, 2, ... over all processes of this run, for services that order points by such a number."""
        self._rows += 1
        self._write()
        return self._rows - 1

    def describe_repeated(self, run: TrackedRun, service: str) -> str:
        """Return a sentence on the steps that are computed again after a resume; "" if there are none."""
        if self.last_step <= run.resumed_step:
            return ""
        return (
            f"; {service} has steps up to {self.last_step} already and keeps their first values, because it cannot "
            "replace a point"
        )

    def _write(self) -> None:
        state = {"id": self.id, "service": self.service, "rows": self._rows, "last_steps": self._last_steps}
        write_atomically(self._path, state)


def _group(tag: str) -> str:
    return tag.partition("/")[0]
