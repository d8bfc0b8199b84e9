"""Check how the numbers of all ranks become those of a run. What ranks measure is checked in tests/multiprocess."""

from __future__ import annotations

import math

import pytest

from tinytrain_dist.metrics.stability_metrics import stability_groups

SIZES = {"embed_tokens": 100, "layers.0": 25, "layers.1": 4, "lm_head": 100}
NORMS = {"embed_tokens": 5.0, "layers.0": 10.0, "layers.1": 3.0, "lm_head": 20.0}
# two ranks with two micro-batches of 6 elements; of each block the sum of squares and the largest score
ROWS = [[3.0, 6.0, 1.0, 5.0, 2.0, -1.0, 3.0, 4.0, 6.0, -2.0], [7.0, 6.0, 5.0, 9.0, 10.0, -3.0, 7.0, 8.0, 14.0, -0.5]]


def test_numbers_of_all_ranks_and_micro_batches_are_combined() -> None:
    groups = stability_groups(ROWS, NORMS, SIZES)
    assert groups["grad_rms_by_layer"] == {"embed_tokens": 0.5, "layers.0": 2.0, "layers.1": 1.5, "lm_head": 2.0}
    expected = {"layers.0": math.sqrt(16 / 24), "layers.1": math.sqrt(32 / 24)}
    assert groups["activation_rms_by_layer"] == pytest.approx(expected)
    assert groups["attention_logit_max_by_layer"] == {"layers.0": 9.0, "layers.1": -0.5}
    assert groups["stability"] == {"embedding_norm_max": 7.0, "attention_logit_max": 9.0}


def test_what_is_not_a_number_is_not_hidden() -> None:
    rows = [[3.0, 6.0, math.inf, 5.0, 2.0, math.nan], [7.0, 6.0, 5.0, 9.0, 10.0, -3.0]]
    groups = stability_groups(rows, NORMS, SIZES)
    assert math.isnan(groups["activation_rms_by_layer"]["layers.0"])
    assert math.isnan(groups["attention_logit_max_by_layer"]["layers.1"])
    assert math.isnan(groups["stability"]["attention_logit_max"])
    assert groups["attention_logit_max_by_layer"]["layers.0"] == 9.0
