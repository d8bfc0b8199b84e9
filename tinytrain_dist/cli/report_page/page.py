"""Fill the page of a report with runs: one HTML file that needs no other file and no network.

Must not know how runs are read. Everything from a run goes through `markup.escaped` or `markup.script_data`. A browser
runs no other script than script.js, because the page names its hash.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from tinytrain_dist import __version__
from tinytrain_dist.cli.report_page.charts import CHARTS, draw, draw_events, script_values, style_of
from tinytrain_dist.cli.report_page.markup import escaped, number_text, script_data, setting_text, table
from tinytrain_dist.cli.report_page.run_data import RunData
from tinytrain_dist.utils.text import format_duration

FOLDER = Path(__file__).parent
# in the first lines of page.html: `tinytrain report` replaces only a file that has it
MARK = '<meta name="generator" content="tinytrain report">'
STATE_CLASSES = {"done": "good", "failed": "bad", "dead": "bad"}
SWATCH = '<svg class="key {style}" viewBox="0 0 26 10" aria-hidden="true"><path class="line" d="M0,5H26"/></svg>'
CONTROLS = """<form id="controls" hidden aria-label="How curves are drawn">
<label><input type="radio" name="x" value="steps" checked> by steps</label>
<label><input type="radio" name="x" value="tokens"> by tokens</label>
<label><input type="checkbox" name="xlog"> logarithmic horizontal axis</label>
<label><input type="checkbox" name="ylog"> logarithmic vertical axis</label>
<label>smoothing <input type="range" name="smoothing" min="0" max="20" value="4"></label>
</form>"""


def fill_page(runs: Sequence[RunData], title: str) -> str:
    """Return the page as HTML."""
    sections = {name: content for name, content in _sections(runs) if content}
    style, script = _file("style.css"), _file("script.js")
    names = ", ".join(run.name for run in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    return Template(_file("page.html")).substitute(
        title=escaped(title),
        subtitle=escaped(f"{len(runs)} runs: {names}" if len(runs) > 1 else f"Run {names}"),
        navigation="".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections),
        sections="\n".join(
            f'<section id="{_anchor(name)}">\n<h2>{name}</h2>\n{content}\n</section>'
            for name, content in sections.items()
        ),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=script_data(script_values(runs)),
        version=escaped(__version__),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _file(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _sections(runs: Sequence[RunData]) -> Iterator[tuple[str, str]]:
    """Yield the title and the content of each section; no content for a section that has nothing to show."""
    yield "Summary", _summary(runs)
    yield "Curves", _curves(runs)
    yield "Events", _events(runs)
    yield "Samples", _samples(runs)
    yield "Settings", _settings(runs)
    yield "Environment", _environment(runs)


def _named(runs: Sequence[RunData]) -> list[tuple[str, RunData]]:
    """Return each run with its name in HTML, behind the colour of its curves."""
    return [(f"{SWATCH.format(style=style_of(n))} {escaped(run.name)}", run) for n, run in enumerate(runs)]


# ---------------------------------------------------------------- summary


def _summary(runs: Sequence[RunData]) -> str:
    columns = ["run", "state", "step", "tokens", "train loss", "eval loss", "least eval loss"]
    columns += ["tokens/s", "MFU", "memory", "time"]
    rows = [(name, *_summary_cells(run)) for name, run in _named(runs)]
    endings = "\n".join(
        f"<li>{name}: {_state(run)}{escaped(': ' + run.reason if run.reason else '')}"
        f"{escaped('; newest checkpoint ' + run.checkpoint if run.checkpoint else '')}</li>"
        for name, run in _named(runs)
    )
    return (
        f"{table(columns, rows, numeric=True)}\n<p class='note'>Losses are the last ones; tokens/s and MFU are medians "
        "over the run; memory is the highest peak of a rank; time is from the first record to the last.</p>\n"
        f'<h3>How each run ended</h3>\n<ul id="endings">\n{endings}\n</ul>'
    )


def _state(run: RunData) -> str:
    kind = STATE_CLASSES.get(run.state)
    return f'<span class="{kind}">{escaped(run.state)}</span>' if kind else escaped(run.state)


def _summary_cells(run: RunData) -> list[str]:
    curves = run.curves
    mfu = curves["mfu"].median
    memory = max((point.high for point in curves["memory_gib"].points if point.finite), default=None)
    seconds = None if run.first_time is None or run.last_time is None else run.last_time - run.first_time
    return [
        _state(run),
        f"{run.step:,}" + (f" of {run.last_step:,}" if run.last_step else ""),
        number_text(run.tokens()),
        number_text(curves["loss"].last, 5) if curves["loss"].points else "",
        number_text(curves["eval_loss"].last, 5) if curves["eval_loss"].points else "",
        number_text(curves["eval_loss"].low, 5),
        number_text(curves["tokens_per_second"].median),
        "" if mfu is None else f"{100 * mfu:.1f} %",
        "" if memory is None else f"{number_text(memory)} GiB",
        "" if seconds is None else format_duration(seconds),
    ]


# ---------------------------------------------------------------- curves


def _curves(runs: Sequence[RunData]) -> str:
    figures = []
    for chart in CHARTS:
        if drawing := draw(chart, runs):
            unit = f" <small>{escaped(chart.unit)}</small>" if chart.unit else ""
            figures.append(f"<figure>\n<figcaption>{escaped(chart.title)}{unit}</figcaption>\n{drawing}\n</figure>")
    if not figures:
        return "<p>No run has recorded a step yet.</p>"
    legend = "\n".join(
        f'<li><label><input type="checkbox" checked hidden> {name}</label></li>' for name, _ in _named(runs)
    )
    return (
        f'<ul class="legend">\n{legend}\n</ul>\n{CONTROLS}\n<div id="charts">\n' + "\n".join(figures) + "\n</div>\n"
        f"{_curve_notes(runs)}"
    )


def _curve_notes(runs: Sequence[RunData]) -> str:
    notes = [
        "The linear axis of the train loss leaves out the first 3 % of the steps where they are above the rest. "
        "Dashed vertical lines are events, without saves."
    ]
    if any(curve.is_merged for run in runs for curve in run.curves.values()):
        notes.append(
            "Long runs are drawn with fewer points: a line is the mean of neighbouring records, and the area around it "
            "reaches from the least to the greatest of them."
        )
    for run in runs:
        for chart in CHARTS:
            curve = run.curves[chart.name]
            if curve.not_finite:
                first = number_text(curve.first_not_finite, 9)
                notes.append(
                    f"{run.name}: {curve.not_finite:,} values of {chart.title.lower()} are not finite (NaN or "
                    f"infinite), the first at step {first}."
                )
    return "\n".join(f'<p class="note">{escaped(note)}</p>' for note in notes)


# ---------------------------------------------------------------- events and samples


def _events(runs: Sequence[RunData]) -> str:
    parts = []
    if drawing := draw_events(runs):
        parts.append(f"<figure>\n{drawing}\n</figure>")
    for name, run in _named(runs):
        kept, counts = run.events.kept(), run.events.counts
        if not kept:
            continue
        rows = [(str(event.step), _date(event.time), escaped(event.kind), escaped(event.text)) for event in kept]
        hidden = sum(counts.values()) - len(kept)
        note = f"<p class='note'>{hidden:,} event(s) between the first and the last of a kind are left out.</p>"
        listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
        parts.append(
            f"<details><summary>{name}: {escaped(listed)}</summary>\n"
            f"{table(('step', 'time (UTC)', 'kind', 'text'), rows)}\n{note if hidden else ''}</details>"
        )
    return "\n".join(parts)


def _date(seconds: float | None) -> str:
    try:
        return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # no such year
        return ""


def _samples(runs: Sequence[RunData]) -> str:
    parts = []
    for name, run in _named(runs):
        samples = run.samples()
        for number, record in enumerate(reversed(samples)):  # the newest first, and open
            texts = "\n".join(
                f'<pre><span class="prompt">{escaped(prompt)}</span>{escaped(continuation)}</pre>'
                for prompt, continuation in record["texts"]
            )
            parts.append(
                f"<details{'' if number else ' open'}><summary>{name}, step {record['step']}</summary>\n{texts}\n"
                "</details>"
            )
        if run.num_sampled > len(samples):
            parts.append(
                f"<p class='note'>{name}: {run.num_sampled - len(samples):,} evaluation(s) between the first and the "
                "last are left out.</p>"
            )
    return "\n".join(["<p class='note'>Prompts are grey; what follows is the model's.</p>", *parts]) if parts else ""


# ---------------------------------------------------------------- settings and environment


def _settings(runs: Sequence[RunData]) -> str:
    values = [{name: setting_text(value) for name, value in run.settings.items()} for run in runs]
    if not any(values):
        return ""
    return _comparison(runs, values, "settings", "not set")


def _environment(runs: Sequence[RunData]) -> str:
    values = [_environment_values(run.environment) for run in runs]
    return _comparison(runs, values, "entries", "not recorded") if any(values) else ""


def _environment_values(environment: dict[str, Any]) -> dict[str, str]:
    """Return the entries of environment.json as text, with a sum in place of the list of ranks."""
    values: dict[str, str] = {}
    for key, value in environment.items():
        if key == "ranks" and isinstance(value, list):
            ranks = [rank for rank in value if isinstance(rank, dict)]
            devices = Counter(str(rank.get("device")) for rank in ranks)
            values["ranks"] = str(len(value))
            values["devices"] = setting_text(", ".join(f"{count} x {device}" for device, count in devices.items()))
            hosts = dict.fromkeys(str(rank.get("host")) for rank in ranks)
            values["hosts"] = setting_text(", ".join(hosts))
        elif key == "variables" and isinstance(value, dict):
            values |= {name: setting_text(text) for name, text in value.items()}
        else:
            values[key] = setting_text(value)
    return values


def _comparison(runs: Sequence[RunData], values: Sequence[dict[str, str]], what: str, missing: str) -> str:
    """Return a table of what differs between the runs, and one of everything, folded away if there are several runs."""
    names = list(dict.fromkeys(name for of_run in values for name in of_run))
    columns = ["", *(name for name, _ in _named(runs))]

    def rows(shown: Sequence[str]) -> list[list[str]]:
        faint = f'<span class="faint">{missing}</span>'
        return [
            [escaped(name), *(escaped(of_run[name]) if name in of_run else faint for of_run in values)]
            for name in shown
        ]

    everything = table(columns, rows(names))
    if len(runs) == 1:
        return f"<details><summary>All {len(names)} {what}</summary>\n{everything}\n</details>"
    different = [name for name in names if len({of_run.get(name) for of_run in values}) > 1]
    differences = table(columns, rows(different)) if different else f"<p>All {what} are the same.</p>"
    return f"{differences}\n<details><summary>All {len(names)} {what}</summary>\n{everything}\n</details>"
