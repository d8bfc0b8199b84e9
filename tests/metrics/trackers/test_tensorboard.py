"""Check what TensorBoard reads from a run: curves without repeated steps, charts, events, texts and settings."""

import dataclasses
import math
import os
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.run_log import GROUPS, WORK, config_in, records, values
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.trackers.tags import EVENT_ROWS


def board(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars(tag)]


def as_an_earlier_run(folder: Path) -> None:
    """Rename event files to an earlier second, by which TensorBoard sorts them, instead of waiting for the next."""
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
    """If a tag is renamed, no chart may become empty. Patterns match from the start of a tag, as in TensorBoard."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    log = RunLog(config_in(tmp_path), True, 0)
    names = "step_time grad_norm_by_layer weight_norm_by_layer attention_logit_max_by_layer activation_rms_by_layer"
    groups = {**{name: {"x": 1.0} for name in names.split()}, "stability": {"embedding_norm_max": 1.0}}
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
    (both,) = [chart for chart in charts if chart.title == "train and eval"]
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
