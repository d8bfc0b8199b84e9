"""docs/evaluation.md: lm-evaluation-harness reads a checkpoint as it is, and gets the likelihoods of our own model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tinytrain_dist.checkpoint.load_model import load_model
from tinytrain_dist.checkpoint.load_tokenizer import load_tokenizer

MISSING = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
QUESTION, CHOICES = "def add(a, b):\n    return", [" a + b", " b - a"]
TASK = """\
task: tiny_code
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def likelihood(checkpoint: Path, choice: str) -> float:
    """Return the log-likelihood of a choice after the question, as our own model computes it."""
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    question = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    ids = torch.tensor(tokenizer.encode(QUESTION + choice, add_special_tokens=False).ids)[-13:]  # context_len is 12
    first = len(tokenizer.encode(QUESTION + choice, add_special_tokens=False).ids) - len(question)
    model = load_model(checkpoint, torch.device("cpu")).eval()
    with torch.no_grad():
        log_probabilities = model(ids[None, :-1])[0].log_softmax(-1)
    each = log_probabilities.gather(1, ids[1:, None])[-first:]
    return float(each.sum())


# in CI, where the extra `test` is installed, a missing library is a failure
@pytest.mark.skipif(bool(MISSING) and not os.environ.get("CI"), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.slow
def test_it_scores_a_checkpoint_as_it_is(text_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(text_checkpoint, tmp_path / "checkpoint"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}  # as `prepare` writes them
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    data = tmp_path / "tiny.jsonl"
    data.write_text(json.dumps({"question": QUESTION, "choices": CHOICES, "answer": 0}) + "\n")
    (tmp_path / "tiny.yaml").write_text(TASK.replace("FILE", str(data)))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "tiny_code"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32", "--include_path", str(tmp_path)]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_tiny_code_*.jsonl")
    sample = json.loads(file.read_text())
    theirs = [float(response[0]) for response in sample["filtered_resps"]]
    assert theirs == pytest.approx([likelihood(text_checkpoint, choice) for choice in CHOICES], abs=1e-4)
    assert sample["acc"] == float(theirs[0] > theirs[1])
