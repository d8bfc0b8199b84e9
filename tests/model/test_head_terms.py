"""Check the soft cap of the logits and the z-loss against the plain formula with autograd, in every mode."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.models import SMALL, random_model, some_ids
from tests.model.test_loss import assert_near, problem
from tinytrain_dist.model.loss import (
    IGNORE_INDEX,
    choose_chunk_loss,
    chunk_loss_and_grad,
    chunk_token_losses_and_grad,
    head_loss_sum,
)
from tinytrain_dist.model.transformer import TransformerLM

TERMS = [(5.0, None), (None, 0.03), (5.0, 0.03)]  # soft cap, z-loss


@functools.cache
def compiled(soft_cap: float | None, z_loss: float | None) -> Any:
    return torch.compile(choose_chunk_loss(False, soft_cap, z_loss), dynamic=False, fullgraph=True)


def plain(logits: torch.Tensor, targets: torch.Tensor, soft_cap: float | None, z_loss: float | None) -> Any:
    """Return the summed cross-entropy and the summed z-loss by their formulas."""
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    z_losses = (z_loss or 0.0) * logits.logsumexp(dim=-1) ** 2
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"), z_losses[
        targets != IGNORE_INDEX
    ].sum()


def expected(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *terms: float | None) -> list[Any]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, z = plain(hidden @ weight.T, targets, *terms)
    (loss + z).backward()
    return [loss.detach(), z.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("mode", ["eager", "by token", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_formula(terms: Any, mode: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(24, 16, 61, seed=5, ignored=0.2)
    hidden, weight = hidden.to(dtype), weight.to(dtype).float()
    exact = expected(hidden, weight, targets, *terms)
    piece = compiled(*terms) if mode == "compiled" else choose_chunk_loss(mode == "by token", *terms)
    for chunk in (12,) if mode == "compiled" else (None, 12):
        ours, weights = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        z_losses: list[torch.Tensor] = []
        loss = head_loss_sum(ours, weights, targets, chunk, piece, [] if mode == "by token" else None, z_losses)
        loss.backward()
        found = [loss.detach(), sum(z_losses, torch.zeros(())), ours.grad, weights.grad]
        assert len(z_losses) == (0 if terms[1] is None else len(targets) // (chunk or len(targets)))
        # bfloat16 keeps 8 bits, see test_bf16_hidden_with_float32_weight
        for value, truth in zip(found, exact, strict=True):
            assert_near(value, truth, 2e-5 if dtype == torch.float32 else 0.02)
    assert exact[1] > 1 or terms[1] is None
    without = expected(hidden, weight, targets, None, None)
    assert (exact[2] - without[2]).abs().max() > 0.05 * exact[2].abs().max(), "the terms matter"


def test_ignored_tokens_have_no_gradient_from_either_term() -> None:
    hidden, weight, targets = problem(10, 6, 31, seed=4, ignored=0.5)
    hidden.requires_grad_()
    head_loss_sum(hidden, weight, targets, 4, choose_chunk_loss(False, 5.0, 0.03)).backward()
    ignored = targets == IGNORE_INDEX
    assert (hidden.grad[ignored] == 0).all()
    assert (hidden.grad[~ignored] != 0).any(dim=1).all()


def test_without_terms_the_code_path_is_the_one_without_them() -> None:
    assert choose_chunk_loss(False, None, None) is chunk_loss_and_grad
    assert choose_chunk_loss(True, None, None) is chunk_token_losses_and_grad


def test_a_model_with_a_cap_gives_capped_logits_and_their_loss() -> None:
    config = dataclasses.replace(SMALL, logit_soft_cap=0.5)
    capped, model = random_model(config), random_model(SMALL)
    ids = some_ids(SMALL, length=16)
    logits = model(ids)
    assert logits.abs().max() > 0.5
    torch.testing.assert_close(capped(ids), 0.5 * torch.tanh(logits / 0.5))
    loss = F.cross_entropy(capped(ids).flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(capped(ids, ids), loss)


def test_a_z_loss_is_part_of_the_gradient_only_and_is_not_computed_in_evaluations() -> None:
    config = dataclasses.replace(SMALL, z_loss=0.1)
    model, reference = random_model(config), random_model(SMALL)
    ids = some_ids(SMALL, length=16)
    with torch.no_grad():
        assert torch.equal(model(ids, ids), reference(ids, ids))
    assert model.lm_head.z_losses == []
    loss = model(ids, ids)
    loss.backward()
    assert torch.equal(loss, reference(ids, ids))
    logits = reference(ids)
    z_loss = 0.1 * logits.logsumexp(dim=-1).square().sum()
    torch.testing.assert_close(model.lm_head.z_losses, [z_loss.detach()])
    (F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum") + z_loss).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_models_that_compute_in_narrow_types_have_both_terms(precision: Any) -> None:
    config = dataclasses.replace(SMALL, logit_soft_cap=5.0, z_loss=0.01)
    model = TransformerLM(config, precision=precision)
    ids = some_ids(SMALL, length=16)
    loss = model(ids, ids)
    loss.backward()
    logits = model(ids).double()
    exact = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=5e-3, atol=0)
    (z_loss,) = model.lm_head.z_losses
    torch.testing.assert_close(z_loss.double(), 0.01 * logits.logsumexp(dim=-1).square().sum(), rtol=5e-3, atol=0)
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
