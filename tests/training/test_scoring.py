"""Windows that predict every token once, and the loss over them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tinytrain_dist.model.document_mask import positions_in_documents
from tinytrain_dist.training.scoring import Score, TokenMarks, Window, sliding_windows, summarize, window_losses


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_every_token_but_the_first_is_predicted_once(num_tokens: int, context_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context_len))
    windows = sliding_windows(num_tokens, context_len, stride)
    predicted = [token for w in windows for token in range(w.end - w.scored + 1, w.end + 1)]
    assert predicted == list(range(1, num_tokens))
    assert all(w.begin >= 0 and w.end - w.begin <= context_len and 1 <= w.scored <= w.end - w.begin for w in windows)
    for window in windows[1:]:
        contexts = [token - window.begin for token in range(window.end - window.scored + 1, window.end + 1)]
        assert min(contexts) >= min(context_len - stride + 1, window.end - window.scored + 1), "context of each token"


class Bigram(nn.Module):
    """Logits that depend on the present and the previous token, so that the context of a window shows."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocab_size, vocab_size, vocab_size, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        before = F.pad(ids, (1, 0))[:, :-1]
        return self.table[before, ids]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_losses_are_those_of_a_loop_over_tokens(stride: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 7, 50).astype(np.uint16)
    model = Bigram(7)
    windows = sliding_windows(len(tokens), 8, stride)
    losses = window_losses(model, tokens, windows, torch.device("cpu"))
    expected = []
    for window in windows:
        ids = torch.from_numpy(tokens[window.begin : window.end].astype(np.int64))[None]
        log_probabilities = model(ids).log_softmax(-1)[0].double()
        positions = range(len(ids[0]) - window.scored, len(ids[0]))
        expected.append(-sum(float(log_probabilities[p, int(tokens[window.begin + p + 1])]) for p in positions))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert summarize(losses, windows).loss == pytest.approx(sum(expected) / 49, rel=1e-6)


def test_the_standard_error_is_that_of_the_mean_for_equal_windows() -> None:
    windows = [Window(0, 4, 4)] * 5
    losses = [4.0, 8.0, 6.0, 2.0, 5.0]
    score = summarize(losses, windows)
    means = np.array(losses) / 4
    assert score.loss == pytest.approx(means.mean())
    assert score.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(5))
    assert (score.tokens, score.windows) == (20, 5)
    assert math.isnan(summarize([1.0], windows[:1]).standard_error)
    assert Score(1.0, 0.1, 8, 2, 8 * math.log(2)).bits_per_byte(4) == pytest.approx(2.0)


class Documents(nn.Module):
    """Logits that depend on the place of a token in its document, so that a boundary shows."""

    def forward(self, ids: Tensor, targets: None, documents: Tensor) -> Tensor:
        assert targets is None
        assert documents.dtype == torch.int32
        assert not documents[:, 0].any()
        return F.one_hot(positions_in_documents(documents) % 7, 7).float()


@pytest.mark.parametrize("stride", [3, 8])
def test_only_tokens_that_count_are_scored_and_documents_are_separated(stride: int) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 7, 50).astype(np.uint16)
    begins = generator.random(50) < 0.2
    marks = TokenMarks((generator.random(50) < 0.5) & ~begins, np.cumsum(begins))
    windows = sliding_windows(len(tokens), 8, stride)
    losses = window_losses(Documents(), tokens, windows, torch.device("cpu"), marks=marks)
    assert marks.counted is not None
    assert marks.documents is not None
    expected = 0.0
    for window in windows:
        for target in range(window.end - window.scored + 1, window.end + 1):
            own = [t for t in range(window.begin, target) if marks.documents[t] == marks.documents[target - 1]]
            log_probabilities = F.one_hot(torch.tensor((len(own) - 1) % 7), 7).float().log_softmax(0)
            expected -= float(log_probabilities[int(tokens[target])]) * bool(marks.counted[target])
    score = summarize(losses, windows, marks)
    assert (score.tokens, score.windows) == (int(marks.counted[1:].sum()), len(windows))
    assert score.loss == pytest.approx(expected / score.tokens, rel=1e-6)
    nothing = TokenMarks(np.zeros(50, np.bool_))
    assert math.isnan(summarize([0.0] * len(windows), windows, nothing).loss)
