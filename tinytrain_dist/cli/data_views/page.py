"""Fill a page with the numbers of token files: one HTML file that needs no other file, no network and no script.

Must not know how the numbers were computed. Everything from the data goes through `_shown`.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from tinytrain_dist import __version__
from tinytrain_dist.cli.data_views import text, windows
from tinytrain_dist.cli.data_views.charts import SHARES, draw_bars, draw_frequencies, length_bins, share_bins
from tinytrain_dist.cli.data_views.findings import Findings
from tinytrain_dist.cli.report_page.markup import escaped, table
from tinytrain_dist.cli.report_page.page import FOLDER as REPORT_FOLDER
from tinytrain_dist.data.statistics.windows import MarkedWindow
from tinytrain_dist.utils.text import printable

FOLDER = Path(__file__).parent
# in the first lines of page.html: `tinytrain data --html` replaces only a file that has it
MARK = '<meta name="generator" content="tinytrain data">'
FREQUENT = 30  # token IDs in the table


def fill_page(findings: Findings, shown: Sequence[MarkedWindow], notes: Sequence[str] = ()) -> str:
    """Return the page as HTML. shown: windows to show as text. notes: sentences about them."""
    sections = {name: content for name, content in _sections(findings, shown, notes) if content}
    style = "".join((folder / "style.css").read_text(encoding="utf-8") for folder in (REPORT_FOLDER, FOLDER))
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=f"Data of {_shown(findings.place.name)}",
        subtitle=f"{findings.train.tokens:,} tokens of training data",
        navigation="".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections),
        sections="\n".join(
            f'<section id="{_anchor(name)}">\n<h2>{name}</h2>\n{content}\n</section>'
            for name, content in sections.items()
        ),
        style=style,
        style_hash="sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=escaped(__version__),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _shown(text: str) -> str:
    """Return text from the data for a page: what a browser would not show, or obey, becomes an escape."""
    return escaped(printable(text))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _sections(findings: Findings, shown: Sequence[MarkedWindow], notes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the title and the content of each section; no content for a section that has nothing to show."""
    yield "Summary", _summary(findings)
    yield "Documents", _documents(findings)
    yield "Duplicates", _duplicates(findings)
    yield "Tokens", _tokens(findings)
    yield "Overlap", _overlap(findings)
    yield "Windows", _windows(findings, shown, notes)


def _summary(findings: Findings) -> str:
    columns = ["", "tokens", "documents", "bytes per token", "count in the loss", "files", "format"]
    rows = []
    for name, split in text.splits(findings):
        for source in split.sources:
            known = source.documents_are != "unknown"
            counted = "" if source.counted_tokens is None else text.share(source.counted_tokens, source.tokens)
            label = name if len(split.sources) == 1 else f"{name} {source.entry}"
            per_token = "not known" if split.bytes is None or not split.tokens else f"{split.bytes / split.tokens:.3f}"
            cells = (
                f"{source.tokens:,}",
                f"{source.lengths.documents:,}" if known else "not known",
                per_token,
                counted,
            )
            rows.append([_shown(label), *cells, f"{source.files:,}", escaped(source.formats)])
    lines = "\n".join(f"<p>{_shown(note)}</p>" for note in text.notes(findings))
    return f"{table(columns, rows, numeric=True)}\n{lines}"


def _documents(findings: Findings) -> str:
    known = [(name, split.lengths) for name, split in text.splits(findings) if split.documents_known]
    known = [(name, lengths) for name, lengths in known if lengths.documents]
    if not known:
        return ""
    figures, rows, histogram_rows = [], [], []
    for number, (name, lengths) in enumerate(known):
        bounds, counts = length_bins(lengths)
        title = f"Documents of {printable(name)} by length"
        labels = [f"{bound:,}" for bound in bounds[:-1]]
        drawing = draw_bars(f"chart-lengths-{number}", title, labels, counts, "tokens, from this number on", number)
        figures.append(_figure(title, drawing))
        values = [lengths.least, *lengths.percentiles(text.PERCENTS), lengths.greatest]
        rows.append([_shown(name), *(f"{value:,}" for value in values), f"{lengths.mean:,.1f}"])
        histogram_rows += [
            [_shown(name), f"{low:,} to {high - 1:,}", f"{count:,}", text.share(count, lengths.documents)]
            for low, high, count in zip(bounds, bounds[1:], counts, strict=False)
        ]
    columns = ["tokens of documents", "least", *(f"{percent} %" for percent in text.PERCENTS), "most", "mean"]
    return (
        f"{_charts(figures)}\n{table(columns, rows, numeric=True)}\n"
        "<details><summary>The numbers of the pictures</summary>\n"
        f"{table(('', 'tokens', 'documents', 'share'), histogram_rows, numeric=True)}</details>"
    )


def _duplicates(findings: Findings) -> str:
    rows = []
    for name, split in text.splits(findings):
        if found := split.duplicates:
            shares = text.share(found.repeats, found.documents), text.share(found.repeated_tokens, split.tokens)
            numbers = f"{found.documents:,}", f"{found.repeats:,}", shares[0], f"{found.repeated_tokens:,}", shares[1]
            rows.append([_shown(name), *numbers])
    if not rows:
        return ""
    columns = ["", "documents", "exact repeats of another one", "share", "tokens in them", "share"]
    copies = [
        [*map(_whole, (f"{each.copies:,}", f"{each.tokens:,}", each.place)), f"<code>{_shown(each.text)}</code>"]
        for each in findings.repeated
    ]
    most = f"<h3>Most copies</h3>\n{table(('copies', 'tokens', 'first copy', 'beginning'), copies)}" if copies else ""
    return f"{table(columns, rows, numeric=True)}\n{most}"


def _tokens(findings: Findings) -> str:
    counts, texts = findings.train.counts, findings.vocabulary.texts
    parts = []
    if drawing := draw_frequencies(counts.counts):
        parts.append(_charts([_figure("How often each token occurs, by rank", drawing)]))
    size = findings.vocabulary.size
    if size is not None:
        unused = size - counts.used
        parts.append(
            f"<p>{unused:,} of {size:,} ids ({text.share(unused, size)}) never occur in the training data.</p>"
        )
    special = [[_shown(name), str(token), f"{count:,}"] for token, name, count in text.special_counts(findings)]
    parts.append(
        f"<h3>Special tokens that occur</h3>\n{table(('token', 'id', 'count'), special, numeric=True)}"
        if special
        else "<p>No special token occurs.</p>"
    )
    frequent = [
        [
            f"<code>{escaped(text.token_name(findings, token))}</code>",
            f"{token:,}",
            f"{count:,}",
            text.share(count, findings.train.tokens),
            "special" if token in texts.special else "",
        ]
        for token, count in counts.most_frequent(FREQUENT)
    ]
    if frequent:
        parts.append(f"<h3>Most frequent</h3>\n{table(('token', 'id', 'count', 'share', ''), frequent, numeric=True)}")
    return "\n".join(parts)


def _overlap(findings: Findings) -> str:
    if not findings.overlaps:
        return ""
    figures, rows, lines = [], [], []
    for number, (name, overlap) in enumerate(findings.overlaps.items()):
        bins = share_bins(overlap.found.ngrams, overlap.found.found)
        title = f"Windows of {printable(name)} by their share of {findings.ngram}-grams in the training data"
        figures.append(_figure(title, draw_bars(f"chart-overlap-{number}", title, SHARES, bins, "share", number)))
        rows.append([_shown(name), *(f"{count:,}" for count in bins)])
        lines += [f"<li>{_shown(line)}</li>" for line in text.overlap_lines(findings, name, overlap)]
    listed = "\n".join(lines)
    columns = ["windows", *SHARES]
    return f"{_charts(figures)}\n{table(columns, rows, numeric=True)}\n<ul>\n{listed}\n</ul>"


def _windows(findings: Findings, shown: Sequence[MarkedWindow], notes: Sequence[str]) -> str:
    if not shown:
        return ""
    texts = findings.vocabulary.texts
    parts = ["<p class='note'>Underlined tokens do not count as targets; the first token of a window never does.</p>"]
    parts += [f"<p class='note'>{_shown(note)}</p>" for note in notes]
    for window in shown:
        pieces = []
        for segment in windows.segments(window):
            if segment.boundary:
                pieces.append(f'<span class="begin">— {segment.boundary} —</span>')
            content = escaped(windows.segment_text(segment, texts))
            pieces.append(content if segment.counted else f'<span class="uncounted">{content}</span>')
        if window.padding:
            pieces.append(f'<span class="begin">— {window.padding:,} tokens of padding —</span>')
        parts.append(f"<h3>{_shown(windows.heading(window))}</h3>\n<pre>{''.join(pieces)}</pre>")
    return "\n".join(parts)


def _whole(text: str) -> str:
    """Return a number or a name that is not broken into lines."""
    return f'<span class="whole">{_shown(text)}</span>'


def _figure(title: str, drawing: str) -> str:
    return f"<figure>\n<figcaption>{escaped(title)}</figcaption>\n{drawing}\n</figure>"


def _charts(figures: Sequence[str]) -> str:
    return '<div class="charts">\n' + "\n".join(figures) + "\n</div>"
