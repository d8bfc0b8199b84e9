"""Every problem with the setting `trackers` is a sentence before the run starts."""

import dataclasses
import re
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers.run_log import GROUPS, WORK, config_in, values
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.metrics import trackers
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.trackers import CLASSES, check_trackers

PAGE = Path(__file__).resolve().parents[3] / "docs" / "trackers.md"


def problem_of(*trackers: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_trackers(TrainingConfig(trackers=trackers))
    return caught.value.problems


class NotInstalled:
    """An import hook: these libraries are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name in ("wandb", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without_libraries(monkeypatch):
    for name in [name for name in sys.modules if re.match(r"(wandb|mlflow)(\.|$)", name)]:
        monkeypatch.delitem(sys.modules, name)
    for module, _, library in CLASSES.values():
        if library:
            monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])


def test_a_missing_library_is_named_with_the_command_that_installs_it(without_libraries):
    assert problem_of("tensorboard", "wandb", "mlflow") == [
        f"trackers: {name} needs a library that is not installed; pip install 'tinytrain_dist[{name}]', or take {name} "
        "off the list"
        for name in ("wandb", "mlflow")
    ]


def test_without_trackers_no_library_is_needed(without_libraries, tmp_path):
    log = RunLog(dataclasses.replace(config_in(tmp_path), trackers=()), True, 0)
    log.train(1, values(1.0), GROUPS, WORK)
    log.close()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such:Thing", r"cannot be imported from /.* \(ModuleNotFoundError: No module named 'no'\)"),
        ("json:Thing", r"cannot be imported from /.* \(AttributeError: .*Thing"),
        ("tests.helpers.trackers:NoTracker", r"is not derived from tinytrain_dist\.Tracker"),
        ("tests.helpers.trackers:NeedsArguments", r"cannot be created without arguments \(TypeError: .*address"),
    ],
)
def test_a_class_that_cannot_be_used(name, message):
    (problem,) = problem_of(name)
    assert re.match(f"trackers: {name} {message}", problem)


def test_a_module_whose_import_blocks_holds_the_start_for_a_limited_time(tmp_path, monkeypatch):
    (tmp_path / "blocking_tracker.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(trackers, "START_SECONDS", 0.2)
    check_trackers(TrainingConfig(trackers=("blocking_tracker:Any",)))
    names = [thread.name for thread in threading.enumerate()]
    assert "load tracker blocking_tracker:Any" in names, "the import did not block"


def test_the_tracker_of_the_page_runs_from_the_current_folder(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(program.splitlines()) <= 25
    (tmp_path / "own_tracker.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    log = RunLog(dataclasses.replace(config_in(tmp_path), trackers=("own_tracker:CsvTracker",)), True, 0)
    log.train(1, values(0.5), {}, WORK)
    log.close()
    file = tmp_path / "logs" / "own_tracker.CsvTracker" / "numbers.csv"
    assert "1,train/loss,0.5" in file.read_text().splitlines()
    assert f"tracker own_tracker:CsvTracker: writing to {file}" in capsys.readouterr().out
