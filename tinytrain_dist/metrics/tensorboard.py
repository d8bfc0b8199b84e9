"""Write the TensorBoard files of a run: curves, charts, texts, histograms and markers of events.

Must not know how the numbers are computed, or which rank writes: the run log creates a writer only on rank 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from tinytrain_dist.config.schema import TrainingConfig

# The numbers of a logged step, by the part of their tag before the name.
TAG_GROUPS = {
    "train": ("loss", "lr", "grad_norm"),
    "speed": ("tokens_per_second", "step_seconds", "data_wait_seconds", "memory_gib", "mfu", "goodput"),
    "health": ("skipped_steps", "slowest_to_median", "slowest_rank"),
}
TAGS = {name: f"{group}/{name}" for group, names in TAG_GROUPS.items() for name in names}
# In the chart of events, each kind is a row of dots, one at the step of each event.
EVENTS = (
    "resumed", "restarted", "saved", "save_failed", "skipped", "slow", "replicas_differ", "stopped", "recompiled",
    "output_lost",
)  # fmt: skip
EVENT_ROWS = {kind: row for row, kind in enumerate(EVENTS, 1)}
# The settings by which the HPARAMS tab compares runs. By default it shows the first five in alphabetical order.
COMPARED_SETTINGS = tuple(
    "batch_size context_len d_model d_ff lr_max lr_min num_heads num_layers parallel precision schedule seed "
    "total_steps warmup_iters weight_decay".split()
)


FLUSH_SECONDS = 10  # a crash loses at most the points of this many seconds


def _chart(*tags: str) -> list[Any]:
    """Return a chart with all curves whose tag begins with a match of one of the regular expressions `tags`."""
    return ["Multiline", list(tags)]


# The CUSTOM SCALARS tab: charts by category and title.
CUSTOM_SCALARS = {
    "loss": {
        "train and eval": _chart("train/loss$", "eval/loss$"),
        "by tokens": _chart("loss_by_tokens/"),
        "learning rate": _chart("train/lr$"),
    },
    "throughput": {
        "tokens per second": _chart("speed/tokens_per_second$"),
        "seconds per step, by phase": _chart("step_time/"),
        "goodput (share of wall time) and MFU (share of peak FLOP/s)": _chart("speed/goodput$", "speed/mfu$"),
    },
    "health": {
        "events, one row for each kind: " + ", ".join(EVENTS): _chart("events/"),
        "gradient norm before clipping": _chart("train/grad_norm$"),
        "own work, slowest rank to median": _chart("health/slowest_to_median$"),
        "gradient norm by layer": _chart("grad_norm_by_layer/"),
        "weight norm by layer": _chart("weight_norm_by_layer/"),
        "peak memory of a rank, GiB": _chart("speed/memory_gib$"),
    },
}


class TensorBoardWriter:
    """Write the TensorBoard files of a run.

    Hides old points after the step at which the run resumes, so that no step appears twice.
    """

    def __init__(self, config: TrainingConfig, step: int) -> None:
        """Open the files, and write the charts, the configuration and the settings by which to compare runs."""
        folder = config.logs_dir
        self._tokens_per_step = config.batch_size * config.context_len
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)
        self._file_writer: Any = self._writer._get_file_writer()
        # Curves by tokens need a folder of their own, because TensorBoard compares purge_step with the x value of every
        # point in a folder.
        self._by_tokens: Any = SummaryWriter(
            str(folder / "by_tokens"), purge_step=step * self._tokens_per_step + 1, flush_secs=FLUSH_SECONDS
        )
        self._writer.add_custom_scalars(CUSTOM_SCALARS)
        self.add_text("about/configuration", indented_code(config.to_toml()), step)
        self._session_end = self._begin_session(config)

    def _begin_session(self, config: TrainingConfig) -> Any:
        """Write the settings for the HPARAMS tab, and return the summary that marks the run as ended."""
        resolved = config.resolved()
        settings = {name: resolved[name] for name in COMPARED_SETTINGS if resolved[name] is not None}
        # the tab shows the latest point of this curve, so it has a value even during the run and after a crash
        metrics = {"eval/loss" if config.val_data else "train/loss": 0.0}
        experiment, session_start, session_end = hparams(settings, metrics)
        self._file_writer.add_summary(experiment)
        self._file_writer.add_summary(session_start)
        return session_end

    def add_numbers(self, step: int, values: dict[str, float], groups: dict[str, dict[str, float]]) -> None:
        """Add a point to each number's curve: `values` that are in TAGS, and all `groups`, with the tag GROUP/NAME."""
        for name, value in values.items():
            if name in TAGS:
                self._writer.add_scalar(TAGS[name], value, step)
        for group, numbers in groups.items():
            for name, value in numbers.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def add_loss(self, kind: str, step: int, loss: float) -> None:
        """Add a point to the curve of a loss by tokens. kind: train or eval."""
        self._by_tokens.add_scalar(f"loss_by_tokens/{kind}", loss, step * self._tokens_per_step)

    def add_histogram(self, tag: str, values: list[float], step: int) -> None:
        """Add the distribution of `values`."""
        self._writer.add_histogram(tag, np.asarray(values), step)

    def add_event(self, kind: str, text: str, step: int) -> None:
        """Add a text, and a dot in the row of its kind; row 0 for a kind that is not in EVENTS."""
        self.add_text(f"events/{kind}", text, step)
        self._writer.add_scalar(f"events/{kind}", EVENT_ROWS.get(kind, 0), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Write everything that is still in memory to the files."""
        self._writer.flush()
        self._by_tokens.flush()

    def close(self) -> None:
        """Mark the run as ended, flush and close the files."""
        self._file_writer.add_summary(self._session_end)
        self._writer.close()
        self._by_tokens.close()


def indented_code(text: str) -> str:
    """Return `text` as a code block in Markdown: indented, because the text itself may contain a fence."""
    return "\n".join("    " + line for line in text.splitlines())
