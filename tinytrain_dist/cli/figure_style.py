"""Create and write pictures in one style, for the verbs that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.utils.stale_files import remove_leftovers, temporary_path

Numbers = NDArray[np.float64]
# Okabe and Ito, "Color Universal Design": distinct for any colour vision, and in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK = "#333333"
FAINT = "#DDDDDD"


def new_figure(**options: Any) -> tuple[Any, Any]:
    """Return a new matplotlib figure that needs no display. Errors: TinytrainError without matplotlib."""
    try:
        import matplotlib.ticker
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TinytrainError(
            "matplotlib: not installed, but a picture needs it; pip install 'tinytrain_dist[plot]' "
            "(`tinytrain schedule` without --out does not need it)"
        ) from None
    figure = Figure(figsize=(8, 5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(**options)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.grid(axis="y", color=FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9)
        ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    return figure, axes


def save_figure(figure: Any, out: Path) -> None:
    """Write the picture and print its path.

    Errors: ConfigError for another suffix than .png, .svg or .pdf; TinytrainError if it cannot be written.
    """
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"out: {out} is not the name of a picture; it must end in .png, .svg or .pdf", "the settings")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent, of=out.name)
        aside = temporary_path(out)  # so that there is never half a picture
        try:
            figure.savefig(aside, format=out.suffix[1:].lower())
            aside.replace(out)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise TinytrainError(f"out: {out} cannot be written ({error.strerror}); give another path with --out") from None
    print(out)
