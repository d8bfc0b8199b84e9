"""Check AdamW against its formula and torch's AdamW, and that its bits do not depend on how a tensor is cut.

No ranks are used: a piece of a tensor represents a shard. The update of an element must not depend on the elements
around it. tests/multiprocess has sharded parameters on real processes.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.tensors import positional, some
from tinytrain_dist.optim import adamw
from tinytrain_dist.optim.adamw import AdamW
from tinytrain_dist.optim.clipping import clip_gradients


def test_the_signatures_stay_as_documented():
    assert positional(AdamW) == ["params", "lr", "betas", "eps", "weight_decay"]
    assert positional(clip_gradients) == ["params", "max_norm", "eps"]


def textbook(theta: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float):
    """AdamW in float64 (Loshchilov & Hutter 2017, algorithm 2): decay first, eps after the bias correction."""
    theta = theta.double()
    m = torch.zeros_like(theta)
    v = torch.zeros_like(theta)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        theta = theta - lr * decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat = m / (1 - betas[0] ** t)
        v_hat = v / (1 - betas[1] ** t)
        theta = theta - lr * m_hat / (v_hat.sqrt() + eps)
    return theta, m, v


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: list[list[Tensor]]) -> None:
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()


SETTINGS = [
    {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.5, 0.999), "eps": 0.5, "weight_decay": 0.0},  # eps that shows where it is added
    {"lr": 0.1, "betas": (0.0, 0.0), "eps": 1e-3, "weight_decay": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(7, 5), (64,), (3,), ()])
def test_adamw_is_the_formula(settings, shape):
    grads = [some(shape, seed, scale=10.0 ** (seed - 3)) for seed in range(1, 6)]
    param = nn.Parameter(some(shape, 0))
    expected = textbook(
        param.detach(), grads, settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"]
    )
    optimizer = AdamW([param], **settings)
    run(optimizer, [param], [[g] for g in grads])
    state = optimizer.state[param]
    for ours, exact in zip((param.detach(), state["exp_avg"], state["exp_avg_sq"]), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    assert state["step"].item() == 5


@pytest.mark.parametrize("settings", SETTINGS)
def test_adamw_is_torchs_own(settings):
    shapes = [(7, 5), (130,), (1, 1)]
    ours = [nn.Parameter(some(s, i)) for i, s in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    steps = [[some(s, 10 * t + i) for i, s in enumerate(shapes)] for t in range(1, 6)]
    run(AdamW(ours, **settings), ours, steps)
    run(torch.optim.AdamW(theirs, foreach=False, fused=False, **settings), theirs, steps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_decay_comes_before_the_update():
    # one step from 1 with lr = 1: the update is -1 whatever the gradient; decaying after it would leave 0
    param = nn.Parameter(torch.ones(3))
    run(AdamW([param], lr=1.0, eps=0.0, weight_decay=0.5), [param], [[torch.full((3,), 7.0)]])
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.5))


def test_eps_is_added_after_the_bias_correction():
    param = nn.Parameter(torch.zeros(3))
    run(AdamW([param], lr=1.0, eps=1.0, weight_decay=0.0), [param], [[torch.full((3,), 1.0)]])
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.5))  # -1 / (1 + eps)


def test_defaults_are_torchs():
    ours, theirs = AdamW([torch.zeros(1)]).defaults, torch.optim.AdamW([torch.zeros(1)]).defaults
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"eps": -1e-9},
        {"weight_decay": -0.1},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
    ],
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=rf"AdamW: needs .* got .*{next(iter(settings))}="):
        AdamW([torch.zeros(1)], **settings)


def test_groups_have_their_own_settings_and_betas_stay_a_tuple():
    decayed, plain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}], 0.1, [0.9, 0.95], 1e-8, 0.0)  # type: ignore[arg-type]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    run(optimizer, [decayed, plain], [[torch.zeros(2, 2), torch.zeros(2)]])
    torch.testing.assert_close(decayed.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(plain.detach(), torch.ones(2))


def test_parameters_without_gradient_are_left_alone():
    used, unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(4))
    assert not torch.equal(used.detach(), torch.ones(4))
    assert optimizer.state[unused]["step"].item() == 0


def test_a_closure_is_called_with_gradients_on():
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1)

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert not torch.equal(param.detach(), torch.ones(3))


def test_materialize_makes_zeros_once():
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = AdamW([param], lr=0.1)
    optimizer.materialize()
    state = optimizer.state[param]
    assert {name: (tuple(t.shape), t.dtype, t.sum().item()) for name, t in state.items()} == {
        "step": ((), torch.float32, 0.0),
        "exp_avg": ((3, 2), torch.float32, 0.0),
        "exp_avg_sq": ((3, 2), torch.float32, 0.0),
    }
    run(optimizer, [param], [[torch.ones(3, 2)]])
    before = {name: t.clone() for name, t in state.items()}
    optimizer.materialize()
    assert all(torch.equal(before[name], optimizer.state[param][name]) for name in before)


def test_the_gradient_is_not_changed():
    param = nn.Parameter(torch.ones(5))
    grad = some((5,), 1)
    run(AdamW([param], lr=0.1), [param], [[grad]])
    assert param.grad is not None
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("size", [5, 64])
def test_skip_decides_whether_anything_changes(size):
    def fresh() -> tuple[nn.Parameter, AdamW]:
        param = nn.Parameter(some((size,), 0))
        optimizer = AdamW([param], lr=0.1)
        run(optimizer, [param], [[some((size,), 1)]])
        return param, optimizer

    (param, optimizer), (plain, plain_optimizer) = fresh(), fresh()
    before = [param.detach().clone(), *(t.clone() for t in optimizer.state[param].values())]
    param.grad = torch.full((size,), float("nan"))
    optimizer.step(skip=torch.ones(()))
    after = [param.detach(), *optimizer.state[param].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    param.grad, plain.grad = some((size,), 2), some((size,), 2)
    optimizer.step(skip=torch.zeros(()))
    plain_optimizer.step()
    assert not torch.equal(param.detach(), before[0])
    assert torch.equal(param.detach(), plain.detach())
    assert optimizer.state[param]["step"].item() == 2


def whole_and_cut(cuts: list[int], size: int, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and both moments after some steps, for one tensor, and for its pieces joined again."""
    values, grads = some((size,), 0), [some((size,), t) for t in range(1, steps + 1)]
    whole = nn.Parameter(values.clone())
    one = AdamW([whole], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    run(one, [whole], [[g] for g in grads])
    pieces = [nn.Parameter(piece.clone()) for piece in values.tensor_split(cuts)]
    many = AdamW(pieces, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    run(many, pieces, [list(g.tensor_split(cuts)) for g in grads])
    names = ("exp_avg", "exp_avg_sq")
    return (
        [whole.detach(), *(one.state[whole][n] for n in names)],
        [torch.cat([p.detach() for p in pieces]), *(torch.cat([many.state[p][n] for p in pieces]) for n in names)],
    )


ODD_CUTS = list(range(37, 10_000, 263))


def test_the_bits_of_an_update_do_not_depend_on_where_a_tensor_is_cut():
    for whole, cut in zip(*whole_and_cut(ODD_CUTS, 10_003), strict=True):
        assert torch.equal(whole, cut)


def test_without_filled_vectors_the_bits_do_depend_on_it(monkeypatch):
    monkeypatch.setattr(adamw, "_pad_to_simd_width", lambda *pieces: lambda: None)
    same = [torch.equal(whole, cut) for whole, cut in zip(*whole_and_cut(ODD_CUTS, 10_003), strict=True)]
    if all(same):
        pytest.skip("this CPU's kernel rounds alike in whole and in incomplete vectors")
    assert not all(same)


@given(st.lists(st.integers(0, 200), max_size=6).map(sorted), st.integers(1, 200))
def test_any_cut_gives_the_same_bits(cuts, size):
    for whole, cut in zip(*whole_and_cut([min(c, size) for c in cuts], size, steps=2), strict=True):
        assert torch.equal(whole, cut)


@pytest.mark.parametrize("shape", [(3, 5), (4, 16), (17, 3)])
def test_a_transposed_parameter_is_updated_in_place(shape):
    base = some(shape, 0)
    expected = nn.Parameter(base.T.contiguous())
    viewed = base.clone().T.requires_grad_()
    grads = [some(expected.shape, t) for t in (1, 2)]
    run(AdamW([expected], lr=0.1), [expected], [[g] for g in grads])
    run(AdamW([viewed], lr=0.1), [viewed], [[g] for g in grads])
    assert not viewed.is_contiguous()
    assert torch.equal(viewed.detach(), expected.detach())


def test_the_kernel_divides_the_gradients_by_the_scale_and_keeps_the_quotients():
    """The shape does not fill whole SIMD vectors, so the quotients come back from a padded copy."""
    grad = some((7, 5), 1)
    scaled, plain = nn.Parameter(some((7, 5), 0)), nn.Parameter(some((7, 5), 0))
    scaled.grad, plain.grad = grad * 4, grad.clone()
    AdamW([scaled], lr=0.1).step(grad_scale=torch.tensor(4.0))
    AdamW([plain], lr=0.1).step()
    assert torch.equal(scaled, plain)
    assert torch.equal(scaled.grad, grad)
