"""fine_tune.sh and sweep.sh run to their end with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.programs import run_script
from tests.helpers.training import config_file

pytestmark = pytest.mark.multiprocess
SHORT = ["--total-steps", "4", "--warmup-iters", "1", "--eval-every", "4", "--eval-steps", "1", "--ckpt-every", "4"]
SHORT += ["--log-every", "1", "--batch-size", "2", "--context-len", "16", "--device", "cpu"]


def write_model(folder: Path) -> Path:
    """Write a tiny Llama and its tokenizer as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from tests.helpers.tokenizers import write_tokenizer

    write_tokenizer(folder, "llama3")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=512, num_key_value_heads=1, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_fine_tuning_ends_with_a_folder_for_transformers(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"the wolf ran home again, {n} wolves" for n in range(400)))
    done = run_script("fine_tune.sh", [model, text, "work", "--nproc", "1", *SHORT], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4: done at step 4 of 4" in done.stdout + done.stderr
    assert "perplexity" in done.stdout
    exported = tmp_path / "work" / "fine_tuned"
    assert json.loads((exported / "config.json").read_text())["model_type"] == "llama"
    assert (exported / "tokenizer.json").is_file()


def test_a_sweep_trains_and_compares_its_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = config_file(tmp_path, total_steps=2, eval_every=2, ckpt_every=2, warmup_iters=1)
    done = run_script("sweep.sh", [config], tmp_path, LEARNING_RATES="1e-3 1e-2")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [tmp_path / "runs" / "sweep" / f"lr_max-{value}" for value in ("1e-3", "1e-2")]
    assert all(json.loads((run / "state.json").read_text())["state"] == "done" for run in runs)
    assert all(run.name in done.stdout for run in runs)
    assert (tmp_path / "runs" / "sweep" / "loss.png").read_bytes().startswith(b"\x89PNG")
