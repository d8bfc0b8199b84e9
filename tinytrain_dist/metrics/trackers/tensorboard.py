"""Write the TensorBoard files of a run: curves, charts, texts, histograms and markers of events.

Must not know how the numbers are computed, or which rank writes: the run log creates a tracker only on rank 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.metrics.trackers.base import Status, TrackedRun, Tracker
from tinytrain_dist.metrics.trackers.tags import EVENT_ROWS, EVENTS

# The settings by which the HPARAMS tab compares runs. Without this choice it shows the first five in the alphabet.
COMPARED_SETTINGS = tuple(
    "batch_size context_len d_model d_ff lr_max lr_min num_heads num_layers parallel precision schedule seed "
    "total_steps warmup_iters weight_decay".split()
)


FLUSH_SECONDS = 10  # a crash loses at most the points of this many seconds


def _chart(*tags: str) -> list[Any]:
    """Return a chart with all curves whose tag matches one of the regular expressions `tags`."""
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
        "largest attention logit, by layer": _chart("attention_logit_max_by_layer/"),
        "RMS of activations, by layer": _chart("activation_rms_by_layer/"),
        "largest norm of an embedding": _chart("stability/embedding_norm_max$"),
        "peak memory of a rank, GiB": _chart("speed/memory_gib$"),
    },
}


class TensorBoardTracker(Tracker):
    """Write the TensorBoard files of a run.

    Hides old points after the step at which the run resumes, so that no step appears twice.
    """

    def start(self, run: TrackedRun) -> None:
        """Open the files, and write the charts, the configuration and the settings by which to compare runs."""
        folder, step = run.logs, run.resumed_step
        self._sizes = BatchSizes.of(run.settings["batch_size"], run.settings["batch_size_warmup"])
        self._context_len = run.settings["context_len"]
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)
        self._file_writer: Any = self._writer._get_file_writer()
        # Curves by tokens need a folder of their own, because TensorBoard compares purge_step with the x value of every
        # point in a folder.
        self._by_tokens: Any = SummaryWriter(
            str(folder / "by_tokens"), purge_step=self._tokens(step) + 1, flush_secs=FLUSH_SECONDS
        )
        self._writer.add_custom_scalars(CUSTOM_SCALARS)
        self.log_text(step, "about/configuration", run.config_toml)
        self._session_end = self._begin_session(run.settings)

    def _begin_session(self, settings: dict[str, Any]) -> Any:
        """Write the settings for the HPARAMS tab, and return the summary that marks the run as ended."""
        compared = {name: settings[name] for name in COMPARED_SETTINGS if settings[name] is not None}
        # the tab shows the latest point of this curve, so it has a value even during the run and after a crash
        metrics = {"eval/loss" if settings["val_data"] else "train/loss": 0.0}
        experiment, session_start, session_end = hparams(compared, metrics)
        self._file_writer.add_summary(experiment)
        self._file_writer.add_summary(session_start)
        return session_end

    def log_numbers(self, step: int, numbers: dict[str, float], time: float) -> None:
        """Add a point to each number's curve, and to the curves of losses by tokens."""
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)
        for kind in ("train", "eval"):
            if f"{kind}/loss" in numbers:
                self._by_tokens.add_scalar(f"loss_by_tokens/{kind}", numbers[f"{kind}/loss"], self._tokens(step))

    def _tokens(self, step: int) -> int:
        return self._sizes.before(step) * int(self._context_len)

    def log_histogram(self, step: int, tag: str, values: list[float]) -> None:
        """Add the distribution of `values`."""
        self._writer.add_histogram(tag, np.asarray(values), step)

    def log_event(self, step: int, kind: str, text: str, time: float) -> None:
        """Add a text, and a dot in the row of its kind; row 0 for a kind that is not in EVENTS."""
        self._writer.add_text(f"events/{kind}", text, step)
        self._writer.add_scalar(f"events/{kind}", EVENT_ROWS.get(kind, 0), step)

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Add a text as a block of code."""
        self._writer.add_text(tag, indented_code(text), step)

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Add the texts generated at an evaluation."""
        parts = [
            f"**prompt**\n\n{indented_code(prompt)}\n\n**continuation**\n\n{indented_code(continuation)}"
            for prompt, continuation in texts
        ]
        self._writer.add_text("samples", "\n\n---\n\n".join(parts), step)

    def flush(self) -> None:
        """Write everything that is still in memory to the files."""
        self._writer.flush()
        self._by_tokens.flush()

    def finish(self, status: Status) -> None:
        """Mark the run as ended unless it failed, flush and close the files."""
        if status != "failed":
            self._file_writer.add_summary(self._session_end)
        self._writer.close()
        self._by_tokens.close()


def indented_code(text: str) -> str:
    """Return `text` as a code block in Markdown: indented, because the text itself may contain a fence."""
    return "\n".join("    " + line for line in text.splitlines())
