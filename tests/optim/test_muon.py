"""Check Muon against its formula and torch's Muon, and that its bits do not depend on how a matrix is cut.

No ranks are used. tests/multiprocess/test_optimizers.py has sharded matrices on real processes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tensors import some
from tinytrain_dist.model.matmul import simulate_device
from tinytrain_dist.optim import muon
from tinytrain_dist.optim.muon import Muon, update_scale
from tinytrain_dist.optim.newton_schulz import newton_schulz_dtype, orthogonalize

SHAPES = [(8, 24), (24, 8), (16, 16), (1, 5)]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], num_steps: int, first: int = 1) -> None:
    for step in range(first, first + num_steps):
        for index, param in enumerate(params):
            param.grad = some(tuple(param.shape), 100 * step + index, scale=10.0 ** (step - 3))
        optimizer.step()


def fresh(shapes: list[tuple[int, int]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(some(shape, index)) for index, shape in enumerate(shapes)]


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """The iteration in float64, without transposing: p(X) = a X + b (X X^T) X + c (X X^T)^2 X."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def textbook(theta: Tensor, grads: list[Tensor], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return weights and momentum in float64."""
    theta, m, momentum, lr = theta.double(), torch.zeros_like(theta).double(), settings["momentum"], settings["lr"]
    rows, columns = theta.shape
    for grad in grads:
        m = momentum * m + (1 - momentum) * grad.double()
        direction = newton_schulz(momentum * m + (1 - momentum) * grad.double(), settings["steps"])
        scale = 0.2 * max(rows, columns) ** 0.5 if settings["scale"] == "match_rms_adamw" else 1.0
        if settings["scale"] == "spectral" and rows > columns:
            scale = (rows / columns) ** 0.5
        theta = theta - lr * settings["weight_decay"] * theta - lr * scale * direction
    return theta, m


@pytest.mark.parametrize("scale", ["match_rms_adamw", "spectral"])
@pytest.mark.parametrize(("momentum", "steps", "weight_decay"), [(0.95, 5, 0.1), (0.5, 2, 0.9), (0.0, 1, 0.0)])
def test_muon_is_the_formula(scale: str, momentum: float, steps: int, weight_decay: float):
    settings = {"lr": 0.02, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "scale": scale}
    params = fresh()
    before = [param.detach().clone() for param in params]
    optimizer = Muon(params, **settings)
    run(optimizer, params, 4)
    for index, (param, start) in enumerate(zip(params, before, strict=True)):
        grads = [some(tuple(param.shape), 100 * step + index, scale=10.0 ** (step - 3)) for step in range(1, 5)]
        weights, buffer = textbook(start, grads, settings)
        torch.testing.assert_close(param.detach().double(), weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"].double(), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize(("scale", "theirs"), [("match_rms_adamw", "match_rms_adamw"), ("spectral", "original")])
def test_muon_is_torchs_own(scale: str, theirs: str, monkeypatch: pytest.MonkeyPatch):
    """torch always orthogonalizes in bf16, so ours does here as well."""
    ours, others, in_float32 = fresh(), fresh(), fresh()
    run(Muon(in_float32, 0.02, 0.9, 0.1, steps=4, scale=scale), in_float32, 5)
    monkeypatch.setattr(muon, "newton_schulz_dtype", lambda _: torch.bfloat16)
    run(Muon(ours, 0.02, 0.9, 0.1, steps=4, scale=scale), ours, 5)
    run(torch.optim.Muon(others, 0.02, 0.1, 0.9, ns_steps=4, adjust_lr_fn=theirs), others, 5)
    moved = [(param - start).detach().abs().max() for param, start in zip(ours, fresh(), strict=True)]
    for param, other, distance in zip(ours, others, moved, strict=True):
        # bf16 has 8 bits; momentum is summed in another order
        torch.testing.assert_close(param, other, rtol=0, atol=0.02 * float(distance))
    assert not any(torch.equal(param, other) for param, other in zip(ours, in_float32, strict=True))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalizing_makes_all_singular_values_about_one(shape: tuple[int, int]):
    values = torch.linalg.svdvals(orthogonalize(some(shape, 1), 10))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(some(shape, 1), full_matrices=False)
    cosine = (orthogonalize(some(shape, 1), 10) * (u @ v)).sum() / (u @ v).square().sum()
    assert 0.8 < float(cosine) < 1.2
    assert torch.equal(orthogonalize(torch.zeros(shape), 5), torch.zeros(shape))


def test_the_type_follows_the_device():
    param = nn.Parameter(torch.ones(2, 2))
    assert newton_schulz_dtype(param) == torch.float32
    with simulate_device("cuda"):
        assert newton_schulz_dtype(param) == torch.bfloat16


def test_an_update_that_matches_adamw_has_a_root_mean_square_of_a_fifth():
    for shape in [(64, 64), (16, 256), (256, 16)]:
        update = orthogonalize(some(shape, 1), 5) * update_scale("match_rms_adamw", *shape)
        assert 0.15 < float(update.square().mean().sqrt()) < 0.25


def test_groups_have_their_own_settings():
    first, second = fresh([(4, 6), (4, 6)])
    start = second.detach().clone()
    optimizer = Muon([{"params": [first]}, {"params": [second], "lr": 0.5, "weight_decay": 0.0, "steps": 3}], 0.0)
    before = first.detach().clone()
    run(optimizer, [first, second], 1)
    assert torch.equal(first.detach(), before)
    grad = some((4, 6), 101, scale=0.01)
    direction = newton_schulz(grad, 3) * 0.5 * update_scale("match_rms_adamw", 4, 6)
    torch.testing.assert_close(second.detach().double(), start - direction, rtol=1e-4, atol=1e-5)


def test_parameters_without_gradient_are_left_alone():
    used, unused = fresh([(4, 6), (6, 4)])
    before = unused.detach().clone()
    optimizer = Muon([used, unused], 0.1)
    used.grad = some((4, 6), 1)
    optimizer.step()
    assert torch.equal(unused.detach(), before)
    assert not optimizer.state[unused]["momentum_buffer"].any()
    assert not torch.equal(used.detach(), some((4, 6), 0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_changes_no_bit_whatever_the_gradients_are(bad: float):
    params, others = fresh(), fresh()
    optimizer, plain = Muon(params, 0.1), Muon(others, 0.1)
    run(optimizer, params, 2)
    run(plain, others, 2)
    params[0].data[0, 0] = others[0].data[0, 0] = -0.0
    optimizer.state[params[0]]["momentum_buffer"][0, 0] = -0.0
    plain.state[others[0]]["momentum_buffer"][0, 0] = -0.0
    before = [t.clone() for param in params for t in (param.detach(), optimizer.state[param]["momentum_buffer"])]
    for param in params:
        param.grad = torch.full_like(param, bad)
    optimizer.step(skip=torch.ones(()))
    after = [t for param in params for t in (param.detach(), optimizer.state[param]["momentum_buffer"])]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.view(torch.int32), new.view(torch.int32))  # so that -0.0 and 0.0 differ

    run(plain, others, 1, first=3)
    for index, param in enumerate(params):
        param.grad = some(tuple(param.shape), 300 + index)
    optimizer.step(skip=torch.zeros(()))
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param.detach(), other.detach())


def test_gradients_are_divided_by_the_scale():
    params, others = fresh(), fresh()
    for index, (param, other) in enumerate(zip(params, others, strict=True)):
        other.grad = some(tuple(param.shape), 10 + index)
        param.grad = other.grad * 4
    Muon(params, 0.1).step(grad_scale=torch.tensor(4.0))
    Muon(others, 0.1).step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param.grad, other.grad)
        assert torch.equal(param, other)


def test_a_closure_is_called_with_gradients_on():
    (param,) = fresh([(3, 2)])

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert Muon([param], 0.1).step(closure).item() == pytest.approx(float(some((3, 2), 0).square().sum()))


@pytest.mark.parametrize("cuts", [[3], [1, 2], [5, 12]])
def test_momentum_and_weights_do_not_depend_on_where_rows_are_cut(cuts: list[int], monkeypatch: pytest.MonkeyPatch):
    """Rows of 23 values do not fill whole SIMD vectors. What the owner computes of the whole matrix is left out."""
    monkeypatch.setattr(muon, "orthogonalize", lambda matrix, steps: matrix)
    whole = nn.Parameter(some((13, 23), 0))
    pieces = [nn.Parameter(piece.clone()) for piece in some((13, 23), 0).tensor_split(cuts)]
    one, many = (Muon(params, 0.1, 0.95, 0.1, scale="spectral") for params in ([whole], pieces))
    monkeypatch.setattr(muon, "update_scale", lambda *_: 1.7)
    for step in (1, 2, 3):
        whole.grad = some((13, 23), step)
        for piece, grad in zip(pieces, whole.grad.tensor_split(cuts), strict=True):
            piece.grad = grad.clone()
        one.step()
        many.step()
    assert torch.equal(whole.detach(), torch.cat([piece.detach() for piece in pieces]))


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": math.nan}, {"steps": 0}])
def test_settings_out_of_range_are_named(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"Muon: needs .* got .*{next(iter(settings))}="):
        Muon([torch.zeros(1, 1)], **settings)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"matrices only, got a parameter of shape \[3\]"):
        Muon([torch.zeros(2, 2), torch.zeros(3)])
