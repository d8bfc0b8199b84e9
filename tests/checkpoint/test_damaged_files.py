"""No reader fails on a damaged file otherwise than by a sentence that names it.

Each case damages one real file of a data folder, a run or its newest checkpoint, and calls all that reads it. For more
cases of each file than in CI, set TINYTRAIN_DAMAGE_CASES=1000.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.helpers import damage
from tests.helpers.tools import newest
from tinytrain_dist.checkpoint.discovery import find_checkpoint, read_trainer_state
from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.checkpoint.load_tokenizer import end_id, load_tokenizer
from tinytrain_dist.checkpoint.manifest import quick_problems, read_manifest
from tinytrain_dist.checkpoint.retention import read_committed_checkpoint
from tinytrain_dist.checkpoint.safetensors_io import TensorReader
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.cli.compare import compare
from tinytrain_dist.cli.ls import ls
from tinytrain_dist.cli.plot import read_curve
from tinytrain_dist.cli.status import status
from tinytrain_dist.config.loading import load_config, resolve_vocab_size
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.bytes_per_token import bytes_per_token
from tinytrain_dist.data.token_file import load_token_dataset
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.metrics.run_log import truncate_records
from tinytrain_dist.model.huggingface_config import check_hf_config
from tinytrain_dist.reliability.error_report import read_abort_request, read_and_clear_error, write_error
from tinytrain_dist.reliability.run_lock import LockFile

CASES = int(os.environ.get("TINYTRAIN_DAMAGE_CASES", "12"))
CAUSE = {"message": "m", "rank": 0, "host": "h", "step": 1, "traceback": "", "time": 1.0, "secondary": True}
RUN = Path("one")
CHECKPOINT = newest(RUN)


@pytest.fixture(scope="module")
def place(text_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with two runs, one of them with all files that a run can have."""
    place = Path(shutil.copytree(text_runs, tmp_path_factory.mktemp("damaged") / "place"))
    host = socket.gethostname()
    beat = {"rank": 0, "world_size": 1, "host": host, "pid": 1, "step": 6, "phase": "data", "seconds": 1.5}
    files = {
        "error.json": CAUSE,
        "lock.json": {"host": host, "pid": os.getpid(), "started": "1", "job": None},
        "logs/ending.json": {"world": "w", "message": "m", "hang": False, "state": "failed"},
        "logs/heartbeat/rank-00000.json": {**beat, "time": 1.0, "world": "w", "attempt": ""},
    }
    (place / RUN / "logs" / "heartbeat").mkdir(exist_ok=True)
    for name, content in files.items():
        (place / RUN / name).write_text(json.dumps(content))
    load_token_dataset(place / "train.npy", vocab_size=300)  # makes train.npy.range.json
    return place


def read_all_tensors(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint, "model")
    for name in reader.files:
        reader.read(name)


def read_manifests(place: Path) -> None:
    find_damage(place / CHECKPOINT)
    quick_problems(place / CHECKPOINT)
    assert find_checkpoint(place / RUN, "model").name >= "checkpoint-00000003", "an older one is valid"
    ls(place / RUN)
    read_manifest(place / CHECKPOINT)


def read_weights(place: Path) -> None:
    assert find_damage(place / CHECKPOINT), "every byte is covered by the manifest"
    assert find_checkpoint(place / RUN, "model").name == "checkpoint-00000003", "the older one is valid"
    read_all_tensors(place / CHECKPOINT)


def read_states(place: Path) -> None:
    assert find_damage(place / CHECKPOINT), "every byte is covered by the manifest"
    assert find_checkpoint(place / RUN, "model").name == "checkpoint-00000003", "the older one is valid"
    read_committed_checkpoint(place / CHECKPOINT)
    ls(place / RUN)
    read_trainer_state(place / CHECKPOINT)
    load_model(place / CHECKPOINT, torch.device("cpu"))


def read_hf_configs(place: Path) -> None:
    assert find_damage(place / CHECKPOINT), "every byte is covered by the manifest"
    with contextlib.suppress(TinytrainError):
        end_id(place / CHECKPOINT)
    check_hf_config(TrainingConfig(vocab_size=280), place / CHECKPOINT)


def read_tokenizers(place: Path) -> None:
    with contextlib.suppress(TinytrainError):
        load_tokenizer(place)
    with contextlib.suppress(TinytrainError):
        bytes_per_token(place, 280)
    from tinytrain_dist.data.preparation.tokenizer import load_vocabulary

    load_vocabulary(str(place), None)


def read_run_files(place: Path) -> None:
    status(place / RUN)
    ls(place / RUN)
    ls(place)
    with contextlib.suppress(TinytrainError):
        load_config(place / RUN / "config.toml")
    compare(place / RUN, place / "other")


def read_records(place: Path) -> None:
    with contextlib.suppress(TinytrainError):
        read_curve(place / RUN, "name", "tokens")
    with contextlib.suppress(TinytrainError):
        read_run_files(place)
    truncate_records(place / RUN / "logs" / "metrics.jsonl", 3)


def read_failures(place: Path) -> None:
    read_abort_request(place / RUN, "w")
    read_run_files(place)
    write_error(place / RUN, CAUSE)
    read_and_clear_error(place / RUN)


def read_locks(place: Path) -> None:
    record = {"host": socket.gethostname(), "pid": os.getpid(), "started": "2", "job": None}
    lock = LockFile(place / RUN / "lock.json", record)
    lock.taken_over()
    lock._is_stale(lock._read_holder())


def read_tokens(place: Path) -> None:
    for mmap in (True, False):
        load_token_dataset(place / "train.npy", mmap, vocab_size=300)


def read_vocabulary_size(place: Path) -> None:
    resolve_vocab_size(TrainingConfig(train_data=str(place / "train.npy")))


Reader = Callable[[Path], object]
FILES: dict[Path, tuple[damage.Damage, Reader]] = {
    CHECKPOINT / "manifest.json": (damage.damaged_manifest, read_manifests),
    CHECKPOINT / "model.safetensors.index.json": (damage.damaged_json, read_weights),
    CHECKPOINT / "model-00001-of-00001.safetensors": (damage.damaged_safetensors, read_weights),
    CHECKPOINT / "trainer_state.json": (damage.damaged_json, read_states),
    CHECKPOINT / "config.json": (damage.damaged_json, read_hf_configs),
    RUN / "state.json": (damage.damaged_json, read_failures),
    RUN / "error.json": (damage.damaged_json, read_failures),
    RUN / "logs" / "ending.json": (damage.damaged_json, read_failures),
    RUN / "logs" / "heartbeat" / "rank-00000.json": (damage.damaged_json, read_run_files),
    RUN / "environment.json": (damage.damaged_json, read_run_files),
    RUN / "logs" / "metrics.jsonl": (damage.damaged_lines, read_records),
    RUN / "config.toml": (damage.damaged_bytes, read_run_files),
    RUN / "lock.json": (damage.damaged_json, read_locks),
    Path("tokenizer.json"): (damage.damaged_json, read_tokenizers),
    Path("tokenizer_config.json"): (damage.damaged_json, read_tokenizers),
    Path("meta.json"): (damage.damaged_json, read_vocabulary_size),
    Path("train.npy"): (damage.damaged_npy, read_tokens),
    Path("train.npy.range.json"): (damage.damaged_json, read_tokens),
}


@contextlib.contextmanager
def damaged(place: Path, name: Path, data: bytes) -> Iterator[None]:
    """Replace a file, and restore what its readers may change."""
    kept = {file: (place / file).read_bytes() for file in FILES}
    (place / name).write_bytes(data)
    try:
        yield
    finally:
        for file, content in kept.items():
            (place / file).write_bytes(content)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_damaged_file_is_a_sentence_or_is_passed_over(name: Path, place: Path) -> None:
    original = (place / name).read_bytes()
    damage_of, read = FILES[name]

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=damage_of(original))
    def check(data: bytes) -> None:
        if data == original:
            return
        sentence = ""
        with damaged(place, name, data):
            try:
                read(place)
            except TinytrainError as error:
                sentence = str(error)
        assert not sentence or str(place) in sentence, "the sentence names the file"
        assert "allow_pickle" not in sentence, "numpy's words help nobody"

    check()
