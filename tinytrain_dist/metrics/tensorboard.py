"""Write the TensorBoard files of a run: which curves share a chart, and what is a text, a marker or a histogram.

Must not know how the numbers come about or which rank writes: the run log has one of these where there is something to
write.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from tinytrain_dist.config.schema import TrainingConfig

TAG_GROUPS = {
    "train": ("loss", "lr", "grad_norm"),
    "speed": ("tokens_per_second", "step_seconds", "data_wait_seconds", "memory_gib", "mfu", "goodput"),
    "health": ("skipped_steps", "slowest_to_median", "slowest_rank"),
}
TAGS = {name: f"{place}/{name}" for place, names in TAG_GROUPS.items() for name in names}
# Each kind of event is a row of dots, so that a chart shows which came when.
EVENTS = ("resumed", "restarted", "saved", "save_failed", "skipped", "slow", "replicas_differ", "stopped", "recompiled")
EVENT_ROWS = {kind: row for row, kind in enumerate(EVENTS, 1)}
# The table of runs has a column for each; it shows the first five unasked, by the alphabet.
COMPARED = tuple(
    "batch_size context_len d_model d_ff lr_max lr_min num_heads num_layers parallel precision schedule seed "
    "total_steps warmup_iters weight_decay".split()
)


def _chart(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


CUSTOM_SCALARS = {
    "loss": {
        "train against eval": _chart("train/loss$", "eval/loss$"),
        "against tokens": _chart("loss_by_tokens/"),
        "learning rate": _chart("train/lr$"),
    },
    "throughput": {
        "tokens per second": _chart("speed/tokens_per_second$"),
        "seconds per step, by phase": _chart("step_time/"),
        "share of the wall time in steps, of the peak in use": _chart("speed/goodput$", "speed/mfu$"),
    },
    "health": {
        "events, a row each: " + ", ".join(EVENTS): _chart("events/"),
        "gradient norm before clipping": _chart("train/grad_norm$"),
        "slowest rank to median rank, own work": _chart("health/slowest_to_median$"),
        "gradient norm by layer": _chart("grad_norm_by_layer/"),
        "weight norm by layer": _chart("weight_norm_by_layer/"),
        "peak memory of a rank, GiB": _chart("speed/memory_gib$"),
    },
}


class TensorBoardWriter:
    """The event files of a run. Points after the step it starts at are hidden, so that no curve folds."""

    def __init__(self, config: TrainingConfig, step: int) -> None:
        """Open the files, and write the layout, the configuration and the settings to compare runs by."""
        folder, self._per_step = config.logs_dir, config.batch_size * config.context_len
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)
        self._events: Any = self._writer._get_file_writer()
        # in a folder of its own, since purge_step is compared with the axis of every point in the folder
        self._by_tokens: Any = SummaryWriter(
            str(folder / "by_tokens"), purge_step=step * self._per_step + 1, flush_secs=10
        )
        self._writer.add_custom_scalars(CUSTOM_SCALARS)
        self.text("about/configuration", indented_code(config.to_toml()), step)
        resolved = config.resolved()
        settings = {name: value for name in COMPARED if (value := resolved[name]) is not None}
        # a metric is the latest point of that curve: it is there during the run and after a crash, too
        metrics = {"eval/loss" if config.val_data else "train/loss": 0.0}
        experiment, start, self._end = hparams(settings, metrics)
        for summary in (experiment, start):
            self._events.add_summary(summary)

    def numbers(self, step: int, values: dict[str, float], groups: dict[str, dict[str, float]]) -> None:
        """Curves: `values` with a place in TAGS, and every number of every group as GROUP/NAME."""
        tagged = {TAGS[name]: value for name, value in values.items() if name in TAGS}
        tagged |= {f"{group}/{name}": value for group, inner in groups.items() for name, value in inner.items()}
        for tag, value in tagged.items():
            self._writer.add_scalar(tag, value, step)

    def loss(self, kind: str, step: int, loss: float) -> None:
        """Add a loss to the chart against tokens; `kind`: train or eval."""
        self._by_tokens.add_scalar(f"loss_by_tokens/{kind}", loss, step * self._per_step)

    def histogram(self, tag: str, values: list[float], step: int) -> None:
        """How `values` spread."""
        self._writer.add_histogram(tag, np.asarray(values), step)

    def event(self, kind: str, text: str, step: int) -> None:
        """Add a text, and a dot in the row of its kind."""
        self.text(f"events/{kind}", text, step)
        self._writer.add_scalar(f"events/{kind}", EVENT_ROWS.get(kind, 0), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """`text` is Markdown."""
        self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Bring everything to the files."""
        self._writer.flush()
        self._by_tokens.flush()

    def close(self) -> None:
        """Mark the run as ended, flush and end."""
        self._events.add_summary(self._end)
        self._writer.close()
        self._by_tokens.close()


def indented_code(text: str) -> str:
    """Text as it is, in Markdown; indented, since a fence could stand in the text itself."""
    return "\n".join("    " + line for line in text.splitlines())
