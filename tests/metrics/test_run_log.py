"""Check the plain record, which keeps every float to the last bit, and the lines on the console."""

import dataclasses
import io
import json
import math
import re
import sys

import pytest

from tests.helpers.run_log import GROUPS, WORK, config_in, records, values
from tinytrain_dist.metrics.run_log import RunLog, truncate_records


def line(step: int) -> str:
    return json.dumps({"kind": "train", "step": step, "loss": step / 7})


def test_records_after_the_step_are_moved_to_another_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) + "\n" for step in (1, 2, 3, 4)))
    truncate_records(path, 2)
    assert path.read_text() == line(1) + "\n" + line(2) + "\n"
    truncate_records(path, 1)
    assert (tmp_path / "metrics.replaced.jsonl").read_text() == "".join(line(step) + "\n" for step in (3, 4, 2))
    truncate_records(path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.replaced.jsonl"]


@pytest.mark.parametrize("torn", ['{"kind": "train", "ste', '{"kind": "tra', "{", "{}", "\x00\x00\x00", ""])
def test_an_incomplete_line_is_dropped_and_the_next_record_starts_a_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "\n" + torn)
    truncate_records(path, 5)
    assert path.read_text() == line(1) + "\n"


def test_a_last_line_without_its_end_is_kept_and_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "\n" + line(2))
    truncate_records(path, 5)
    assert path.read_text() == line(1) + "\n" + line(2) + "\n"


def test_without_a_record_there_is_nothing_to_cut(tmp_path):
    truncate_records(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_the_record_keeps_every_float_to_the_last_bit(tmp_path):
    losses = [0.1, 1 / 3, math.pi, 5e-324, 1.7976931348623157e308, 0.1 + 0.2]
    log = RunLog(config_in(tmp_path), True, 0)
    for step, loss in enumerate(losses, 1):
        log.train(step, values(loss), GROUPS, WORK)
    log.close()
    found = records(tmp_path / "logs" / "metrics.jsonl")
    assert [record["loss"] for record in found] == losses
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in found] == [32 * step for step in range(1, 7)]
    assert found[0]["grad_norm"] == 0.1 + 0.2
    assert found[0]["work_seconds_by_rank"] == WORK
    assert found[0]["step_time"] == GROUPS["step_time"]
    assert {record["kind"] for record in found} == {"train"}


def test_evaluations_and_events_are_recorded_too(tmp_path, capsys):
    log = RunLog(dataclasses.replace(config_in(tmp_path), log_save_prefix="record"), True, 0)
    log.evaluation(5, 2.0, 1.5)
    log.event(6, "saved", "saved to [red]somewhere[/red]")
    log.close()
    evaluation, event = records(tmp_path / "logs" / "record.jsonl")
    assert (evaluation["kind"], evaluation["step"], evaluation["loss"]) == ("eval", 5, 2.0)
    assert evaluation["perplexity"] == math.exp(2.0)
    assert (event["kind"], event["step"], event["text"]) == ("saved", 6, "saved to [red]somewhere[/red]")
    assert capsys.readouterr().out.splitlines() == [
        "step 5: eval loss 2.0000, perplexity 7.39 (1.5 s)",
        "step 6: saved to [red]somewhere[/red]",
    ]


def test_a_loss_beyond_all_bounds_does_not_end_the_run(tmp_path):
    log = RunLog(config_in(tmp_path), True, 0)
    log.evaluation(1, 1e9, 1.0)
    log.train(2, values(math.nan), GROUPS, WORK)
    log.close()
    evaluation, train = records(tmp_path / "logs" / "metrics.jsonl")
    assert evaluation["perplexity"] == math.exp(700.0)
    assert train["loss"] is None, "NaN is not JSON"


def test_each_record_is_in_the_file_at_once(tmp_path):
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(1, values(1.0), GROUPS, WORK)
    assert len(records(tmp_path / "logs" / "metrics.jsonl")) == 1
    log.close()


def test_the_console_line_has_step_loss_speed_and_time_left(tmp_path, capsys):
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(10, values(1.25), GROUPS, WORK)
    log.close()
    expected = "step 10/100 | loss 1.2500 | lr 1.00e-03 | norm 0.300 | 1,234 tok/s | 0:03:00 left"
    assert capsys.readouterr().out.strip() == expected


def test_what_is_left_ends_where_the_process_stops(tmp_path, capsys):
    log = RunLog(dataclasses.replace(config_in(tmp_path), stop_at_step=40), True, 0)
    log.train(10, values(1.25), GROUPS, WORK)
    log.close()
    assert capsys.readouterr().out.strip().endswith("0:01:00 left")


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = RunLog(config_in(tmp_path), False, 0)
    log.train(1, values(1.0), GROUPS, WORK)
    log.evaluation(1, 1.0, 1.0)
    log.event(1, "saved", "x")
    log.about(1, "batch", "x")
    log.samples(1, [("a", "b")])
    log.say("x")
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_and_text_is_not_markup(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(10, values(1.25), GROUPS, WORK)
    log.say("a [red]word[/red]")
    log.close()
    text = terminal.getvalue()
    assert "a [red]word[/red]" in text
    assert "10/100" in text
    assert len(records(tmp_path / "logs" / "metrics.jsonl")) == 1


def test_the_live_line_has_the_numbers_of_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(10, values(1.25) | {"mfu": 0.412}, GROUPS, WORK)
    log._progress.refresh()
    assert "step 10/100 loss 1.2500 | 1,234 tok/s | MFU 41.2 % | 0:03:00 left" in terminal.getvalue()
    assert "| saved" not in terminal.getvalue(), "there is no checkpoint yet"
    log.event(20, "saved", "saved x")
    log.train(20, values(1.0), GROUPS, WORK)
    log.close()
    assert "loss 1.0000 | 1,234 tok/s | 0:02:40 left | saved 20" in terminal.getvalue()


def test_the_live_line_is_one_line_on_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "50")
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(10, values(1.25) | {"mfu": 0.412}, GROUPS, WORK)
    log.close()
    last = re.sub(r"\x1b\[[\d?]*\w", "", terminal.getvalue()).rstrip("\n").rpartition("\r")[2]
    assert "10/100" in last
    assert "\n" not in last


def test_a_full_disk_costs_the_records_and_is_reported_once(tmp_path, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    log = RunLog(config_in(tmp_path), True, 0)
    log._file.close()
    log._file = type("Full", (), {"write": fail, "close": fail})()
    log.event(1, "saved", "x")
    log.event(2, "saved", "y")
    log.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 1
    assert "records cannot be written" in warnings[0]
    assert "training continues without them" in warnings[0]


def test_damaged_lines_are_dropped_when_a_run_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = ['{"kind": "train", "step": 1}', '{"kind": "train", "step": 2, "loss": NaN}']
    bad = [b"\xff\xfe", b"[1]", b"3", b'{"step": "4"}', b"[" * 100_000, b'{"step": 9}', b'{"step": 2, "lo']
    path.write_bytes(b"\n".join([good[0].encode(), *bad, good[1].encode()]) + b"\n")
    truncate_records(path, 3)
    assert path.read_text().splitlines() == good
