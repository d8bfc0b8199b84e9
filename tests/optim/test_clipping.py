"""Check clipping by the global norm against hand-computed values and torch's own."""

import math

import pytest
import torch
from torch import nn

from tests.helpers.tensors import some
from tinytrain_dist.optim.clipping import clip_gradients


def with_grads(*grads: list[float] | None) -> list[nn.Parameter]:
    params = []
    for grad in grads:
        param = nn.Parameter(torch.zeros(len(grad or [0.0])))
        param.grad = None if grad is None else torch.tensor(grad)
        params.append(param)
    return params


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda params: (p for p in params)])
def test_any_iterable_is_clipped_a_generator_too(wrap):
    params = with_grads([3.0, 0.0], None, [0.0, 4.0])
    norm = clip_gradients(wrap(params), 1.0)
    assert norm.item() == 5.0
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(params[2].grad, torch.tensor([0.0, 0.8]))


def test_a_single_tensor_is_clipped():
    (param,) = with_grads([3.0, 4.0])
    assert clip_gradients(param, 1.0).item() == 5.0
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def test_a_small_norm_leaves_the_gradients_as_they_are():
    (param,) = with_grads([3.0, 4.0])
    assert clip_gradients([param], 5.1).item() == 5.0
    assert torch.equal(param.grad, torch.tensor([3.0, 4.0]))


def test_eps_is_added_to_the_norm():
    (param,) = with_grads([3.0, 4.0])
    clip_gradients([param], 1.0, 5.0)
    torch.testing.assert_close(param.grad, torch.tensor([0.3, 0.4]))


def test_clipping_is_torchs_own():
    shapes = [(4, 3), (7,), (1,)]
    ours, theirs = ([nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a.grad, b.grad = some(shapes[i], i), some(shapes[i], i)
    assert torch.equal(clip_gradients(ours, 0.5), nn.utils.clip_grad_norm_(theirs, 0.5))
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_max_norm_that_is_not_positive_is_an_error(max_norm):
    (param,) = with_grads([3.0, 4.0])
    with pytest.raises(ValueError, match=f"max_norm must be greater than 0, got {max_norm}"):
        clip_gradients([param], max_norm)
    assert torch.equal(param.grad, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_an_error_unless_the_caller_looks(value):
    params = with_grads([3.0, 4.0], [value, 1.0])
    with pytest.raises(ValueError, match=f"clip_gradients: the gradient norm is {value}"):
        clip_gradients(params, 1.0)
    norm = clip_gradients(params, 1.0, error_if_nonfinite=False)
    assert not norm.isfinite()
    assert torch.equal(params[0].grad, torch.tensor([3.0, 4.0]))
    assert torch.equal(params[1].grad, torch.tensor([value, 1.0])) or math.isnan(value)
    assert params[1].grad[1] == 1.0


def test_without_gradients_the_norm_is_zero():
    assert clip_gradients(with_grads(None), 1.0).item() == 0.0
    assert clip_gradients([], 1.0).item() == 0.0
