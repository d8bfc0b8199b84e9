"""Read what a report shows of one run. The memory that this needs does not grow with the length of the run.

Must not know how it is shown. A damaged file of the run is no error: what can be read is shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinytrain_dist.cli.report_page.curves import Curve
from tinytrain_dist.cli.status import read_status
from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.config.run_folder import (
    ENVIRONMENT_FILE,
    Record,
    RunFolder,
    iter_records,
    open_run,
    read_settings,
)
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.json_files import is_number, whole_number
from tinytrain_dist.utils.progress import progress_bar

TRAIN_CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib")
FIRST_EVENTS, LAST_EVENTS = 20, 80  # of each kind
MAX_KINDS = 30  # of events; a damaged file may hold any number
MAX_SAMPLED, MAX_TEXTS = 4, 8  # samples: evaluations besides the first, and texts of each
MAX_CHARACTERS = 1500  # of a text


@dataclass(frozen=True)
class Event:
    """An event of a run, such as a save."""

    step: int
    time: float | None  # seconds since 1970
    kind: str
    text: str


class Events:
    """The first and the last events of each kind."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, list[Event]] = {}
        self._last: dict[str, deque[Event]] = {}

    def add(self, event: Event) -> None:
        """Add an event; of a kind with many, one in the middle is dropped."""
        kind = event.kind
        if kind not in self.counts and len(self.counts) == MAX_KINDS:
            return
        self.counts[kind] = self.counts.get(kind, 0) + 1
        first = self._first.setdefault(kind, [])
        if len(first) < FIRST_EVENTS:
            first.append(event)
        else:
            self._last.setdefault(kind, deque(maxlen=LAST_EVENTS)).append(event)

    def kept(self) -> list[Event]:
        """Return the events that were kept, in the order of their steps."""
        kept = [event for events in (*self._first.values(), *self._last.values()) for event in events]
        return sorted(kept, key=lambda event: (event.step, event.time or 0.0))


@dataclass
class RunData:
    """What a report shows of one run."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    curves: dict[str, Curve]
    events: Events = field(default_factory=Events)
    first_samples: Record | None = None
    last_samples: deque[Record] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLED))
    num_sampled: int = 0
    state: str = "not known"  # as `tinytrain status` says
    reason: str = ""
    checkpoint: str = ""  # the name of the newest one
    step: int = 0
    last_step: int = 0  # at which it will stop; 0: not known
    tokens_per_step: float | None = None  # the mean up to the last record
    # with batch_size_warmup: the first step of each phase, the tokens up to it, and those of each step from there on
    token_phases: list[tuple[int, int, int]] = field(default_factory=list)
    first_time: float | None = None
    last_time: float | None = None

    def add(self, record: Record) -> None:
        """Add a record of metrics.jsonl."""
        kind, step = record["kind"], record["step"]
        self.step = max(self.step, step)
        time = record.get("time")
        if is_number(time):
            self.first_time = time if self.first_time is None else self.first_time
            self.last_time = time
        if kind == "train":
            for name in TRAIN_CURVES:
                if is_number(record.get(name)):
                    self.curves[name].add(step, record[name])
            if step and record.get("tokens"):
                self.tokens_per_step = record["tokens"] / step
        elif kind == "eval":
            if is_number(record.get("loss")):
                self.curves["eval_loss"].add(step, record["loss"])
        elif kind == "samples":
            self._add_samples(record)
        elif isinstance(record.get("text"), str):
            self.events.add(Event(step, time if is_number(time) else None, kind[:40], record["text"][:MAX_CHARACTERS]))

    def tokens(self) -> float | None:
        """Return the tokens of all steps so far; None if that is not known."""
        for first, before, per_step in reversed(self.token_phases):
            if first <= self.step:
                return before + (self.step - first) * per_step
        return self.step * self.tokens_per_step if self.tokens_per_step else None

    def _add_samples(self, record: Record) -> None:
        short = {**record, "texts": _short_texts(record.get("texts"))}
        if not short["texts"]:
            return
        self.num_sampled += 1
        if self.first_samples is None:
            self.first_samples = short
        else:
            self.last_samples.append(short)

    def samples(self) -> list[Record]:
        """Return the first and the last records of samples. `texts` holds pairs of prompt and continuation."""
        return [*([self.first_samples] if self.first_samples else []), *self.last_samples]


def _short_texts(texts: Any) -> list[tuple[str, str]]:
    """Return the pairs of texts in a record, cut to a length that can be shown."""
    if not isinstance(texts, list):
        return []
    pairs = (pair for pair in texts if isinstance(pair, list) and len(pair) == 2)
    kept = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str)][:MAX_TEXTS]
    return [(_shorten(prompt), _shorten(continuation)) for prompt, continuation in kept]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} […]"


def read_run(place: Path, name: str, max_points: int) -> RunData:
    """Read a run, or a file of records. max_points: the limit of each curve, an even number.

    Errors: TinytrainError if there is neither.
    """
    run = None if place.is_file() else open_run(place)
    records = place if run is None else run.records
    settings = {} if run is None else read_settings(run.folder)
    environment = {} if run is None else read_json_object(run.folder / ENVIRONMENT_FILE)
    curves = {curve: Curve(max_points) for curve in (*TRAIN_CURVES, "eval_loss")}
    data = RunData(name, settings, environment, curves)
    size = records.stat().st_size if records.is_file() else 0
    last_records: deque[Record] = deque(maxlen=20)
    if run is None or records.is_file():  # a run may have ended before its first record
        with progress_bar(f"reading {name}", size, unit="bytes") as advance:
            for record in iter_records(records, advance):
                data.add(record)
                last_records.append(record)
    if run is not None:
        _add_status(data, run, last_records)
    sizes, context_len = BatchSizes.read(settings), whole_number(settings.get("context_len"))
    if sizes is not None and sizes.varies:
        data.token_phases = [
            (step, sizes.before(step) * context_len, size * context_len) for step, size in sizes.phases
        ]
    if data.tokens_per_step is None:
        product = whole_number(settings.get("batch_size")) * context_len
        data.tokens_per_step = float(product) or None
    return data


def _add_status(data: RunData, run: RunFolder, last_records: Iterable[Record]) -> None:
    status = read_status(run, records=list(last_records))
    data.state, data.reason = status.state, status.reason
    data.step, data.last_step = max(data.step, status.step), status.last_step
    data.checkpoint = status.checkpoint.name if status.checkpoint else ""
