"""`tinytrain report`: one page that needs nothing else, in which everything from a run is text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tools import Cli
from tinytrain_dist.cli.report_page import page
from tinytrain_dist.cli.report_page.curves import Curve, smoothed
from tinytrain_dist.cli.report_page.markup import script_data
from tinytrain_dist.cli.report_page.run_data import FIRST_EVENTS, LAST_EVENTS, MAX_KINDS, Event, Events, read_run
from tinytrain_dist.config.run_folder import iter_records, read_records

VOID = {"meta", "input"}  # the elements of HTML that have no end; those of SVG end with />
ATTACK = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&'"


class Page(HTMLParser):
    """The parts of a page that a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    def values(self, attribute: str) -> list[str]:
        return [str(attributes[attribute]) for _, attributes in self.tags if attribute in attributes]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[1])


def check(path: Path) -> Page:
    """Return a page that is well-formed, whose links have a target, and that loads and runs nothing else."""
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    links = found.values("href") + [value[4:-1] for value in found.values("clip-path")]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    names = set(re.findall(r'getElementById\("([\w-]+)"\)', found.scripts[2])) - {"chart-events", "controls"}
    assert names == {"data", "tip"}
    assert names <= set(ids)
    assert not found.values("src")
    assert not found.values("style")
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", text)
    style, _, script = found.scripts
    policy = next(value for value in found.values("content") if value.startswith("default-src 'none'"))
    for content in (style, script):
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    return found


def write_records(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "logs" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def change_records(run: Path, **values: Any) -> None:
    """Add values to each record of logged steps."""
    records = read_records(run / "logs" / "metrics.jsonl")
    write_records(run, [record | (values if record["kind"] == "train" else {}) for record in records])


def test_one_run_is_shown_in_full(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    code, printed, err = tinytrain("report", run, "--out", out, "--title", "Six steps")
    assert (code, err) == (0, "")
    assert printed.startswith(f"{out}: 1 run, ")
    found = check(out)
    assert {"summary", "curves", "events", "settings", "environment", "chart-loss", "chart-eval_loss"} <= set(
        found.values("id")
    )
    assert "Six steps" in found.text
    assert "done" in found.text
    assert "6 of 6" in found.text
    assert "lr_max" in found.text
    assert "checkpoint-00000006" in found.text
    records = read_records(run / "logs" / "metrics.jsonl")
    (shown,) = found.data["runs"]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert shown["curves"]["loss"]["y"] == pytest.approx(losses, rel=1e-4)
    assert shown["curves"]["loss"]["x"] == [1, 2, 3, 4, 5, 6]
    evaluations = [record["loss"] for record in records if record["kind"] == "eval"]
    assert shown["curves"]["eval_loss"]["y"] == pytest.approx(evaluations, rel=1e-4)
    first = next(record for record in records if record["kind"] == "train")
    assert shown["tokens"] == first["tokens"] / first["step"]


def test_runs_are_compared(tinytrain: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert tinytrain("report", folder / "one", folder / "other", "--out", out)[0] == 0
    found = check(out)
    assert [run["name"] for run in found.data["runs"]] == ["one", "other"]
    section = out.read_text().partition('<section id="settings">')[2].partition("<details>")[0]
    differing = re.findall(r'<th scope="row">(\w+)</th>', section)
    assert "lr_max" in differing
    assert "total_steps" not in differing, "it is the same, and so only in the folded table"
    assert "total_steps" in found.text


def test_many_runs_share_the_size_of_the_page(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    records = [{"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 2001)]
    write_records(run, records)
    out = tmp_path / "report.html"
    assert tinytrain("report", *[run] * 40, "--out", out)[0] == 0
    found = check(out)
    assert len(found.data["runs"]) == 40
    assert all(len(one["curves"]["loss"]["y"]) <= 150 for one in found.data["runs"])
    assert out.stat().st_size < 2e6


def test_what_a_run_holds_is_text(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    hostile = Path(shutil.copytree(run, tmp_path / f"x{ATTACK.replace('/', '.')}"))
    config = (hostile / "config.toml").read_text()
    quoted = json.dumps(ATTACK)
    (hostile / "config.toml").write_text(f"{config}\n[{quoted}]\n{quoted} = {quoted}")
    ranks = [{"host": ATTACK, "device": ATTACK}, ATTACK]
    environment = {ATTACK: ATTACK, "ranks": ranks, "variables": {ATTACK: [ATTACK]}}
    (hostile / "environment.json").write_text(json.dumps(environment))
    (hostile / "state.json").write_text(json.dumps({"state": ATTACK, "reason": ATTACK, "step": 3}))
    half, control = "\ud83d", "\x00\x1b[31m\r\x85"
    with open(hostile / "logs" / "metrics.jsonl", "a") as file:
        for kind in ("saved", ATTACK, half + control):
            file.write(json.dumps({"kind": kind, "step": 6, "text": ATTACK + half + control}) + "\n")
        texts = [[ATTACK + half, control], [ATTACK, "${title} $title"], ["only one"], "text"]
        file.write(json.dumps({"kind": "samples", "step": 6, "texts": texts}) + "\n")
    out = tmp_path / "report.html"
    assert tinytrain("report", hostile, "--out", out, "--title", ATTACK)[0] == 0
    found = check(out)
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert found.text.count(ATTACK) >= 8
    assert "${title} $title" in found.text
    assert "\x1b" not in out.read_text()
    assert found.data["runs"][0]["name"] == hostile.name
    assert script_data("</script><!--&") == '"\\u003c/script\\u003e\\u003c!--\\u0026"'


def test_losses_that_are_not_finite_leave_a_gap(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    change_records(run, loss=None)
    out = tmp_path / "report.html"
    assert tinytrain("report", run, "--out", out)[0] == 0
    assert "6 values of train loss are not finite" in check(out).text
    assert "chart-loss" not in check(out).values("id")
    records = read_records(run / "logs" / "metrics.jsonl")
    losses = [2.0, 1e299, None, -1e299]
    write_records(run, [{**r, "loss": losses[r["step"] % 4], "grad_norm": math.inf} for r in records])
    assert tinytrain("report", run, "--out", out)[0] == 0
    found = check(out)
    assert found.data["runs"][0]["curves"]["loss"]["y"][1] is None
    path = next(str(attributes["d"]) for tag, attributes in found.tags if attributes.get("class") == "raw")
    assert path.count("M") == 2, "a gap at step 2"
    assert "nan" not in path
    assert "inf" not in path


def test_damaged_files_are_no_error(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    records = run / "logs" / "metrics.jsonl"
    damage = [
        b"\xff\xfe\x00",
        b"[1]",
        b"{" * 5000,
        b'{"kind": "train", "step": -1}',
        b'{"kind": 1, "step": 1}',
        b'{"kind": "train", "step": 9223372036854775807, "mfu": "x", "time": 1e300, "tokens": 0}',
        b'{"kind": "samples", "step": 1}',
        b'{"kind": "eval", "step": 3}',
        b'{"kind": "saved", "step": 1, "text": 5}',
        b'{"kind": "stopped", "step": 2, "time": 1e300, "text": ""}',
    ]
    records.write_bytes(b"\n".join([*damage, records.read_bytes(), b'{"kind": "tr']))
    for name in ("config.toml", "environment.json", "state.json"):
        (run / name).write_bytes(b'{"ranks": 3, \xff')
    out = tmp_path / "report.html"
    assert tinytrain("report", run, "--out", out)[0] == 0
    assert len(check(out).data["runs"][0]["curves"]["loss"]["y"]) == 6
    assert tinytrain("report", records, "--out", out)[0] == 0, "the records alone are enough"
    assert "not known" in check(out).text
    records.unlink()
    assert tinytrain("report", run, "--out", out)[0] == 0, "a run may end before its first record"
    assert "No run has recorded a step yet" in check(out).text


def test_a_failed_run_says_why(tinytrain: Cli, run: Path, tmp_path: Path) -> None:
    (run / "state.json").write_text('{"state": "failed", "step": 4}')
    (run / "error.json").write_text('{"message": "rank 1: out of memory"}')
    out = tmp_path / "report.html"
    assert tinytrain("report", run, "--out", out)[0] == 0
    assert "failed: rank 1: out of memory" in check(out).text


def test_only_a_report_is_replaced(tinytrain: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tinytrain("report", run)[0] == 0
    assert tinytrain("report", run)[0] == 0, "an earlier report"
    check(tmp_path / "report.html")
    other = tmp_path / "index.html"
    other.write_text("<p>mine")
    code, _, err = tinytrain("report", run, "--out", other)
    assert code == 2
    assert "exists and is not a report" in err
    assert other.read_text() == "<p>mine"
    (tmp_path / "folder.html").mkdir()
    assert "is a folder, not a regular file; give another path" in tinytrain("report", run, "--out", "folder.html")[2]
    assert "must end in .html" in tinytrain("report", run, "--out", run / "config.toml")[2]
    assert "cannot be written (Not a directory)" in tinytrain("report", run, "--out", other / "page.html")[2]
    assert "no run is given" in tinytrain("report")[2]
    assert page.MARK in (tmp_path / "report.html").read_text()[:500]


def test_a_long_run_needs_little_memory_and_keeps_its_extremes(run: Path) -> None:
    count = 20_000
    with open(run / "logs" / "metrics.jsonl", "w") as file:
        for step in range(1, count + 1):
            loss = 99.0 if step == 7777 else -5.0 if step == 15_555 else 3.0
            file.write(f'{{"kind": "train", "step": {step}, "loss": {loss}, "text": "{"x" * 500}"}}\n')
            file.write(f'{{"kind": "saved", "step": {step}, "text": "{"x" * 500}"}}\n')
    tracemalloc.start()
    data = read_run(run, "run", 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6, "the file has 23 MB"
    points = data.curves["loss"].points
    assert 100 <= len(points) <= 200
    assert sum(point.count for point in points) == count
    assert (min(point.low for point in points), max(point.high for point in points)) == (-5.0, 99.0)
    kept = data.events.kept()
    assert len(kept) == FIRST_EVENTS + LAST_EVENTS
    assert (kept[0].step, kept[-1].step) == (1, count)
    assert data.events.counts == {"saved": count}
    assert next(iter_records(run / "logs" / "metrics.jsonl"))["step"] == 1


def test_merged_points_keep_mean_and_range() -> None:
    curve = Curve(4)
    for x in range(1, 10):
        curve.add(x, math.nan if x == 9 else float(x))
    first, second, third = curve.points
    assert (first.x, first.y, first.low, first.high) == (2.5, 2.5, 1, 4)
    assert (second.x, second.y, second.low, second.high) == (6.5, 6.5, 5, 8)
    assert third.y is None
    assert (curve.not_finite, curve.first_not_finite, curve.last, curve.low) == (1, 9, 8.0, 1.0)
    falling = Curve(4)
    for x in range(1, 9):
        falling.add(x, -x)
    assert [(point.low, point.high) for point in falling.points] == [(-2, -1), (-4, -3), (-6, -5), (-8, -7)]


def test_smoothing_does_not_shift_a_line() -> None:
    line: list[float | None] = [float(x) for x in range(100)]
    assert smoothed(line)[:96] == pytest.approx(line[:96])
    assert smoothed([None, 1.0]) == [None, 1.0]
    assert smoothed([]) == []
    spike: list[float | None] = [1.0] * 100
    spike[50] = 1e20
    assert smoothed(spike)[90] == 1.0, "a huge value leaves the others their digits"


def test_kinds_of_events_are_bounded() -> None:
    events = Events()
    for number in range(1000):
        events.add(Event(number, None, f"kind {number}", ""))
    assert len(events.kept()) == MAX_KINDS


def test_the_verb_needs_no_torch(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    code = (
        "import sys; from tinytrain_dist.cli.main import main; "
        f"main(['report', {str(run)!r}, '--out', {str(out)!r}]); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    check(out)
