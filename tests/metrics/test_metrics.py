"""Owns the checks of what a run tells: the plain record to the last bit, TensorBoard without folds, honest clocks."""

import dataclasses
import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.metrics.device_stats import peak_flops, peak_memory_bytes
from tinytrain_dist.metrics.run_log import RunLog, truncate_records
from tinytrain_dist.metrics.tensorboard import EVENT_ROWS
from tinytrain_dist.metrics.timers import ForwardTimer, HostCopy, StepTimer
from tinytrain_dist.utils.text import format_duration

GROUPS = {"step_time": {"data": 0.25, "forward_backward": 1.5}, "grad_norm_by_layer": {"layers.0": 0.5, "norm": 2.0}}
WORK = [1.0, 1.5]  # seconds of two ranks


def config_in(folder: Path) -> TrainingConfig:
    return TrainingConfig(target_dir=str(folder), batch_size=4, micro_batch_size=2, context_len=8, total_steps=100)


def values(loss: float) -> dict[str, float]:
    return {
        "loss": loss, "lr": 1e-3, "grad_norm": 0.1 + 0.2, "tokens_per_second": 1234.5, "step_seconds": 2.0,
        "data_wait_seconds": 0.0, "memory_gib": 0.5, "skipped_steps": 0.0,
        "goodput": 0.75, "slowest_rank": 1.0, "slowest_to_median": 1.5,
    }  # fmt: skip


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- cutting the record back ---------------------------------------------------------------------------------------


def line(step: int) -> str:
    return json.dumps({"kind": "train", "step": step, "loss": step / 7})


def test_records_after_the_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) + "\n" for step in (1, 2, 3, 4)))
    truncate_records(path, 2)
    assert path.read_text() == line(1) + "\n" + line(2) + "\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"kind": "train", "ste', '{"kind": "tra', "{", "{}", "\x00\x00\x00", ""])
def test_a_torn_line_is_dropped_and_the_next_record_starts_a_line(tmp_path, torn):
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


# --- the record ----------------------------------------------------------------------------------------------------


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
    assert math.isnan(train["loss"])


def test_each_record_is_in_the_file_at_once(tmp_path):
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(1, values(1.0), GROUPS, WORK)
    assert len(records(tmp_path / "logs" / "metrics.jsonl")) == 1
    log.close()


def test_the_console_line_says_step_loss_speed_and_what_is_left(tmp_path, capsys):
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


def test_another_rank_writes_and_says_nothing(tmp_path, capsys):
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


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def board(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars(tag)]


def as_an_earlier_run(folder: Path) -> None:
    """Event files are read in the order of the second in their names; a test has no time to wait for the next one."""
    for path in folder.rglob("events.out.tfevents.*"):
        head, second, rest = path.name.rpartition("tfevents.")[0] + "tfevents", *path.name.split(".", 4)[3:]
        os.rename(path, path.with_name(f"{head}.{int(second) - 100}.{rest}"))


def test_tensorboard_reads_the_curves(tmp_path):
    log = RunLog(config_in(tmp_path), True, 0)
    for step in (1, 2, 3):
        log.train(step, {**values(step / 4), "mfu": 0.5}, GROUPS, WORK)
    log.evaluation(3, 0.5, 1.0)
    log.close()
    logs = tmp_path / "logs"
    assert points(logs, "train/loss") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert points(logs, "eval/loss") == [(3, 0.5)]
    assert points(logs, "eval/perplexity") == [(3, pytest.approx(math.exp(0.5)))]
    assert points(logs / "by_tokens", "loss_by_tokens/train") == [(32, 0.25), (64, 0.5), (96, 0.75)]
    assert points(logs / "by_tokens", "loss_by_tokens/eval") == [(96, 0.5)]
    assert points(logs, "step_time/data") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert points(logs, "grad_norm_by_layer/layers.0") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert set(board(logs).Tags()["scalars"]) == {
        "train/loss", "train/lr", "train/grad_norm", "speed/mfu", "speed/goodput", "speed/tokens_per_second",
        "speed/step_seconds", "speed/data_wait_seconds", "speed/memory_gib", "health/skipped_steps",
        "health/slowest_rank", "health/slowest_to_median", "step_time/data", "step_time/forward_backward",
        "grad_norm_by_layer/layers.0", "grad_norm_by_layer/norm", "eval/loss", "eval/perplexity",
    }  # fmt: skip
    (last,) = [found for found in board(logs).Histograms("by_rank/work_seconds") if found.step == 3]
    assert (last.histogram_value.num, last.histogram_value.min, last.histogram_value.max) == (2, 1.0, 1.5)


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    found = board(folder).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def test_events_are_a_text_and_a_dot_in_the_row_of_their_kind(tmp_path):
    log = RunLog(config_in(tmp_path), True, 0)
    log.event(3, "saved", "a folder")
    log.event(4, "skipped", "not finite")
    log.event(6, "saved", "another folder")
    log.close()
    logs = tmp_path / "logs"
    assert texts(logs, "events/saved") == [(3, "a folder"), (6, "another folder")]
    assert points(logs, "events/saved") == [(3, EVENT_ROWS["saved"]), (6, EVENT_ROWS["saved"])]
    assert points(logs, "events/skipped") == [(4, EVENT_ROWS["skipped"])]
    assert len(set(EVENT_ROWS.values())) == len(EVENT_ROWS)


def test_what_a_person_reads_about_a_run_is_there_from_the_start(tmp_path):
    config = config_in(tmp_path)
    log = RunLog(config, True, 0)
    log.about(0, "batch", "4 = 2 x 2")
    log.samples(0, [("def f(", "x):\n    pass")])
    log.flush()
    logs = tmp_path / "logs"
    ((_, configuration),) = texts(logs, "about/configuration")
    assert "    batch_size = 4" in configuration.splitlines()
    assert texts(logs, "about/batch") == [(0, "    4 = 2 x 2")]
    ((_, sample),) = texts(logs, "samples")
    assert "    def f(" in sample.splitlines()
    assert "        pass" in sample.splitlines()
    assert records(logs / "metrics.jsonl")[-1]["texts"] == [["def f(", "x):\n    pass"]]
    log.close()


def test_every_chart_of_the_layout_has_curves(tmp_path):
    """A tag that is renamed must not leave an empty chart; patterns match from the start, as TensorBoard does it."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    log = RunLog(config_in(tmp_path), True, 0)
    groups = {"step_time": {"data": 1.0}, "grad_norm_by_layer": {"norm": 1.0}, "weight_norm_by_layer": {"norm": 1.0}}
    log.train(1, {**values(1.0), "mfu": 0.5}, groups, WORK)
    log.evaluation(1, 1.0, 1.0)
    log.event(1, "saved", "x")
    log.close()
    logs = tmp_path / "logs"
    tags = [*board(logs).Tags()["scalars"], *board(logs / "by_tokens").Tags()["scalars"]]
    (stored,) = board(logs).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) > 8
    for chart in charts:
        for pattern in chart.multiline.tag:
            assert any(re.match(pattern, tag) for tag in tags), f"{chart.title}: nothing matches {pattern}"
    (both,) = [chart for chart in charts if chart.title == "train against eval"]
    assert [tag for tag in tags if any(re.match(p, tag) for p in both.multiline.tag)] == ["train/loss", "eval/loss"]


def test_runs_compare_by_settings_and_eval_loss(tmp_path):
    from tensorboard.plugins.hparams import metadata

    log = RunLog(dataclasses.replace(config_in(tmp_path), val_data="val.npy", lr_max=0.0125), True, 0)
    log.close()
    found = board(tmp_path / "logs").summary_metadata
    experiment = metadata.parse_experiment_plugin_data(found[metadata.EXPERIMENT_TAG].plugin_data.content)
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/loss"]
    start = metadata.parse_session_start_info_plugin_data(found[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    assert start.hparams["lr_max"].number_value == 0.0125
    assert start.hparams["batch_size"].number_value == 4
    assert start.hparams["schedule"].string_value == "cosine"
    assert "target_dir" not in start.hparams
    assert metadata.SESSION_END_INFO_TAG in found


def test_what_is_flushed_can_be_read_during_the_run(tmp_path):
    log = RunLog(config_in(tmp_path), True, 0)
    log.train(1, values(1.0), GROUPS, WORK)
    log.flush()
    assert points(tmp_path / "logs", "train/loss") == [(1, 1.0)]
    assert points(tmp_path / "logs" / "by_tokens", "loss_by_tokens/train") == [(32, 1.0)]
    log.close()


def test_after_a_resume_no_step_is_there_twice(tmp_path):
    logs = tmp_path / "logs"
    first = RunLog(config_in(tmp_path), True, 0)
    for step in range(1, 8):
        first.train(step, values(float(step)), GROUPS, WORK)
    first.evaluation(4, 40.0, 1.0)
    first.evaluation(6, 60.0, 1.0)
    first.close()
    assert len(points(logs, "train/loss")) == 7
    as_an_earlier_run(logs)

    second = RunLog(config_in(tmp_path), True, 4)  # the checkpoint was at step 4, the run had got to 7
    for step in range(5, 9):
        second.train(step, values(step + 0.5), GROUPS, WORK)
    second.evaluation(6, 60.5, 1.0)
    second.close()
    expected = [1.0, 2.0, 3.0, 4.0, 5.5, 6.5, 7.5, 8.5]
    assert points(logs, "train/loss") == list(enumerate(expected, 1))
    assert points(logs / "by_tokens", "loss_by_tokens/train") == [
        (32 * step, loss) for step, loss in enumerate(expected, 1)
    ]
    assert points(logs, "eval/loss") == [(4, 40.0), (6, 60.5)]
    record = records(logs / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in record if r["kind"] == "train"] == list(enumerate(expected, 1))
    assert [(r["step"], r["loss"]) for r in record if r["kind"] == "eval"] == [(4, 40.0), (6, 60.5)]


def test_a_resume_at_the_same_step_loses_nothing(tmp_path):
    first = RunLog(config_in(tmp_path), True, 0)
    for step in (1, 2, 3):
        first.train(step, values(float(step)), GROUPS, WORK)
    first.close()
    as_an_earlier_run(tmp_path / "logs")
    RunLog(config_in(tmp_path), True, 3).close()
    logs = tmp_path / "logs"
    for folder, tag, scale in ((logs, "train/loss", 1), (logs / "by_tokens", "loss_by_tokens/train", 32)):
        assert [step for step, _ in points(folder, tag)] == [scale, 2 * scale, 3 * scale]
    assert len(records(tmp_path / "logs" / "metrics.jsonl")) == 3


# --- clocks and numbers --------------------------------------------------------------------------------------------


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lap_is_a_duration_and_not_a_clock_reading():
    clock = Clock()
    watch = StepTimer(clock)
    assert watch.lap(103.0) == 3.0
    assert watch.lap(103.5) == 0.5
    assert watch.lap(103.5) == 0.0


def test_a_lap_ends_when_the_step_ended_and_not_when_it_is_asked_for():
    clock = Clock()
    watch = StepTimer(clock)
    clock.now += 50.0  # the numbers of a step are read when the next one is under way
    assert watch.lap(103.0) == 3.0
    assert watch.lap(150.0) == 47.0


def test_pauses_are_left_out_of_their_lap_only():
    clock = Clock()
    watch = StepTimer(clock)
    clock.now += 1.0
    with watch.paused():
        clock.now += 10.0
    with watch.paused():
        clock.now += 5.0
    clock.now += 1.0
    assert watch.lap(clock.now) == 2.0
    clock.now += 4.0
    assert watch.lap(clock.now) == 4.0


def test_a_pause_that_ends_with_an_error_is_left_out_too():
    clock = Clock()
    watch = StepTimer(clock)

    def fail() -> None:
        with watch.paused():
            clock.now += 10.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 1.0
    assert watch.lap(clock.now) == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (60, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00"), (-5, "0:00:00")],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text


def test_a_host_copy_of_cpu_values():
    clock = Clock()
    copy = HostCopy(torch.tensor([1.5, 2.5], requires_grad=True), clock)
    clock.now += 5.0
    assert copy.read() == [1.5, 2.5]
    assert copy.ready_at == 100.0  # they were there when the copy was made, however late they are read


def test_work_is_timed_inside_the_modules_only(monkeypatch):
    inner, outer_only = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    work = ForwardTimer([inner], cuda=False)
    inner.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 2.0))
    outer_only.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 50.0))
    for _ in range(3):
        outer_only(inner(torch.ones(1, 2)))
    assert work.seconds(work.take()) == 6.0
    assert work.take() == []


def test_memory_is_that_of_this_process():
    one_gib = 1 << 30
    assert 10 << 20 < peak_memory_bytes(torch.device("cpu")) < 64 * one_gib


def test_a_cpu_has_no_peak_and_a_gpu_that_of_its_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GTX 1080")
    assert peak_flops(torch.device("cuda")) is None
