"""Check that text, training, checkpoint and export have the same tokens, with a tokenizer that begins every text."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.tools import Cli, newest
from tests.helpers.training import train
from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder, read_manifest, write_file

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

from tests.helpers.tokenizers import TEXTS, write_tokenizer
from tinytrain_dist.cli import sample
from tinytrain_dist.data.preparation.prepare import prepare

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test uses the network


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data of a Llama 3 tokenizer, and the folder of that data."""
    folder = tmp_path_factory.mktemp("llama")
    lines = (json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(TEXTS))
    (folder / "a.jsonl").write_text("".join(lines))
    source = write_tokenizer(folder / "tokenizer", "llama3")
    prepare((str(folder / "a.jsonl"),), str(folder / "data"), tokenizer=str(source), workers=1)
    for name in ("train.npy", "val.npy", "meta.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "data" / name, folder)
    train(folder, "run", 1)
    return folder


def test_a_checkpoint_names_the_tokens_of_its_data(llama: Path) -> None:
    config = json.loads((newest(llama / "run") / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


def test_a_prompt_begins_as_a_document_does(tinytrain: Cli, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sample.load_tokenizer(newest(llama / "run"))
    text = "the wolf <|im_start|>"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert len(ids) > 10, "a special token in a prompt is text, as in the data"
    given = []
    monkeypatch.setattr(sample, "generate", lambda model, ids, *_, **__: given.append(ids) or [])
    options = ("--max-new-tokens", 3)
    code, out, _ = tinytrain("sample", llama / "run", "--prompt", text, *options)
    assert code == 0
    assert out.startswith(text), "what is no text is not shown"
    tinytrain("sample", llama / "run", *options)
    assert given == [ids, [0]], "an empty prompt starts a document"


def test_the_exported_tokenizer_gives_what_the_model_saw(tinytrain: Cli, llama: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    code, out, _ = tinytrain("export", llama / "run", tmp_path / "out")
    assert code == 0
    assert "WARNING" not in out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"the wolf <|im_start|> {TEXTS[0]}"
    assert theirs(text)["input_ids"] == sample.load_tokenizer(tmp_path / "out").encode(text).ids
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def rewritten(checkpoint: Path, out: Path, **texts: str) -> Path:
    """Return a copy of a checkpoint in which some files have other content."""
    aside = Path(shutil.copytree(checkpoint, out.with_name("aside")))
    old, manifest = read_manifest(checkpoint), Manifest()
    manifest.files, manifest.tensors = dict(old.files), old.tensors
    for name, text in texts.items():
        (aside / f"{name}.json").unlink()
        write_file(aside, f"{name}.json", text.encode(), manifest)
    (aside / "manifest.json").unlink()
    commit_folder(aside, out, manifest)
    return out


def test_an_older_checkpoint_is_exported_with_a_warning(tinytrain: Cli, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    checkpoint = newest(llama / "run")
    config = {**json.loads((checkpoint / "config.json").read_text()), "bos_token_id": None}
    names = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}'
    old = rewritten(checkpoint, tmp_path / checkpoint.name, config=json.dumps(config), tokenizer_config=names)
    code, out, _ = tinytrain("export", old, tmp_path / "out")
    assert code == 0
    assert "WARNING: AutoTokenizer begins a text with [0, " in out
    assert "WARNING: AutoTokenizer makes tokens of special tokens that a prompt spells" in out


def test_a_run_over_older_data_is_warned(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("train.npy", "val.npy", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path)
    meta = json.loads((llama / "meta.json").read_text())
    for recorded, warned in ((meta["tokenizer"], False), ({"eos_token": "<|end_of_text|>"}, True)):
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "tokenizer": recorded}))
        train(tmp_path, f"run{warned}", 1)
        assert ("puts '<|begin_of_text|>' around every text" in capfd.readouterr().out) == warned
