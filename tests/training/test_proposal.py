"""Scaling rules, and the run that they propose for a time and a speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.training import proposal as proposals
from tinytrain_dist.training import scaling_rules
from tinytrain_dist.training.proposal import Hardware, Proposal, Timing, propose, reasons
from tinytrain_dist.training.scaling_rules import Budget, best_model, flops_per_token, model_of

FLOPS = 1e15  # per second
VOCABULARY = 32_000


def timed(settings: dict[str, Any]) -> Timing:
    """Time a step on a machine that computes FLOPS, and takes ten seconds to start."""
    model = model_of(settings["num_layers"], settings["vocab_size"])
    return Timing(settings["batch_size"] * model.context_len * flops_per_token(model) / FLOPS, 10.0, {})


def proposed(seconds: float = 3600.0, guess: float = FLOPS, data_tokens: int = 10**12, ranks: int = 8) -> Proposal:
    return propose(seconds, VOCABULARY, data_tokens, Hardware(ranks, False, guess), timed)


@pytest.mark.parametrize("num_layers", [2, 12, 20])
def test_flops_are_those_of_the_model(num_layers: int) -> None:
    config = model_of(num_layers, VOCABULARY)
    with torch.device("meta"):
        model = TransformerLM(config)
    assert flops_per_token(config) == pytest.approx(model.flops_per_token(), rel=1e-12)


@pytest.mark.parametrize("flops", [1e17, 1e19, 1e21])
def test_the_model_gets_twenty_tokens_for_each_parameter(flops: float) -> None:
    model = best_model(VOCABULARY, Budget(flops, 10**13))
    tokens = flops / flops_per_token(model)
    assert 14 < tokens / model.approximate_parameter_count < 28


def test_scarce_data_gives_a_smaller_model_and_at_most_four_epochs() -> None:
    plenty, scarce = (best_model(VOCABULARY, Budget(1e20, tokens)) for tokens in (10**13, 10**9))
    assert scarce.num_layers < plenty.num_layers
    proposal = proposed(36_000, data_tokens=10**9)
    assert proposal.limited_by_data
    assert proposal.tokens == pytest.approx(4e9, rel=0.01)
    assert proposal.seconds < 36_000 / 2
    assert any("the data ends the run" in line for line in reasons(proposal, 10, "x", "y"))


def test_batch_and_rate_are_those_of_the_paper() -> None:
    # the fits in section 3 of the paper, at 1e19 FLOPs
    assert scaling_rules.batch_tokens(1e19) == pytest.approx(0.2920 * 10 ** (19 * 0.3271))
    assert scaling_rules.highest_learning_rate(1e19) == pytest.approx(0.3118 * 10 ** (-19 * 0.1250))
    assert [scaling_rules.batch_sequences(tokens, 1024, 8) for tokens in (1, 8 * 1024, 90_000, 10**6)] == [
        8,
        8,
        64,
        1024,
    ]


@pytest.mark.parametrize("guess", [FLOPS / 50, FLOPS, FLOPS * 50])
def test_the_proposal_does_not_depend_on_the_first_guess_and_fills_the_time(guess: float) -> None:
    proposal = proposed(guess=guess)
    assert proposal.settings == proposed().settings
    assert 0.9 * 3600 < proposal.seconds < 3600
    TrainingConfig(**proposal.settings)  # raises an error if settings contradict each other


@pytest.mark.parametrize("steps", [1, 19, 21, 39, 59, 1000])
def test_there_are_no_more_evaluations_than_time_is_planned_for(steps: int) -> None:
    length = proposals._length(steps)
    assert steps // length["eval_every"] <= proposals.EVALUATIONS
    assert steps // length["ckpt_every"] <= proposals.CHECKPOINTS


def test_settings_that_a_timing_needed_are_kept() -> None:
    def recomputed(settings: dict[str, Any]) -> Timing:
        return Timing(timed(settings).step_seconds, 10.0, {"activation_checkpointing": "block"})

    proposal = propose(3600, VOCABULARY, 10**12, Hardware(8, False, FLOPS), recomputed)
    assert proposal.settings["activation_checkpointing"] == "block"


def test_a_proposal_for_cpus_has_a_micro_batch_that_divides_the_batch() -> None:
    for seconds in (60.0, 600.0, 3600.0):
        settings = propose(seconds, VOCABULARY, 10**9, Hardware(2, True, 1e11), timed).settings
        assert settings["batch_size"] % (2 * settings["micro_batch_size"]) == 0
        assert settings["total_steps"] >= 1


def test_no_time_for_a_step_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="10 s pass before the first step, there is no time for one step"):
        proposed(seconds=9.0)


def test_the_reasoning_takes_ten_lines_with_sources() -> None:
    lines = reasons(proposed(), 1, "8 devices", "simulated")
    assert len(lines) == 10
    assert all(len(line) < 200 for line in lines)
    assert sum("20" in line and "(" in line for line in lines) >= 4
