"""Drawing tokens from a model, and turning them into text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tools import TEXT
from tinytrain_dist import TransformerLM
from tinytrain_dist.checkpoint import load_model
from tinytrain_dist.cli import sample
from tinytrain_dist.training import generation


@pytest.fixture(scope="module")
def model(text_checkpoint: Path) -> TransformerLM:
    return load_model.load_model(text_checkpoint, torch.device("cpu"))


def test_greedy_text_slides_its_window(model: TransformerLM) -> None:
    known = [5, 6, 7]
    for _ in range(3 * model.config.context_len):
        logits = model(torch.tensor([known[-model.config.context_len :]]))
        known.append(int(logits[0, -1].argmax()))
    assert generation.generate(model, [5, 6, 7], 3 * model.config.context_len, temperature=0) == known[3:]
    assert generation.generate(model, [5, 6, 7], 9, top_k=1) == known[3:12]
    assert generation.generate(model, [5, 6, 7], 9, top_k=None, top_p=1e-9) == known[3:12]
    stop = known[8]
    assert generation.generate(model, [5, 6, 7], 99, temperature=0, stop_id=stop) == known[3 : known.index(stop, 3)]


def test_a_long_prompt_counts_by_its_end(model: TransformerLM) -> None:
    tail = list(range(10, 10 + model.config.context_len))
    assert generation.generate(model, [3] * 40 + tail, 8, seed=4) == generation.generate(model, tail, 8, seed=4)
    assert generation.generate(model, [3, *tail[:-1]], 8, seed=4) != generation.generate(model, tail, 8, seed=4)


def test_draws_follow_the_probabilities() -> None:
    weights = np.array([0.1, 0.5, 0.0, 0.4])
    logits = torch.tensor(weights).log()

    def shares(**options: Any) -> list[float]:
        rng, settings = np.random.default_rng(0), {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        drawn = [generation.draw_token(logits, rng, **settings) for _ in range(4000)]
        return [round(drawn.count(i) / len(drawn), 1) for i in range(4)]

    assert shares() == [0.1, 0.5, 0.0, 0.4]
    assert shares(top_k=2) == shares(top_p=0.9) == shares(top_p=0.51) == [0.0, 0.6, 0.0, 0.4]
    assert shares(top_p=0.5) == shares(temperature=0.01) == shares(temperature=0) == [0.0, 1.0, 0.0, 0.0]
    assert shares(temperature=1e6, top_k=2) == [0.0, 0.5, 0.0, 0.5]


def test_text_comes_in_whole_characters(text_checkpoint: Path) -> None:
    tokenizer = sample.load_tokenizer(text_checkpoint)
    ids = tokenizer.encode(TEXT).ids
    stream = generation.TextStream(tokenizer, ids[:3])
    pieces = [stream.add(new) for new in ids[3:]]
    assert "" in pieces, "no character took several ids, so this proves nothing"
    assert "\ufffd" not in "".join(pieces)
    assert tokenizer.decode(ids[:3]) + "".join(pieces) + stream.rest() == TEXT
    half = generation.TextStream(tokenizer, [])
    shown = "".join(half.add(new) for new in tokenizer.encode("a\U0001f600").ids[:-1])
    assert (shown, half.rest()) == ("a", "\ufffd")
