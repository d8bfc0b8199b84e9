"""Check the loss: the public function against log-sum-exp, and the chunked head against the plain one.

Must not know models. References are computed in float64, so an error bound measures the rounding of float32 alone.
"""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.model.loss import (
    IGNORE_INDEX,
    chunk_loss_and_grad,
    chunk_token_losses_and_grad,
    cross_entropy_loss,
    head_loss_sum,
)


def test_the_signature_stays_as_documented():
    parameters = inspect.signature(cross_entropy_loss).parameters
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["logits", "targets"]
    assert [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == ["ignore_index", "reduction"]


def test_two_classes_by_hand():
    loss = cross_entropy_loss(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(4.0))


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log softmax at the target, row by row, in float64."""
    rows, ids = logits.double().reshape(-1, logits.shape[-1]), targets.reshape(-1)
    losses = [rows[i].logsumexp(0) - rows[i, ids[i]] for i in range(len(ids))]
    return torch.stack(losses).reshape(targets.shape)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
def test_every_number_of_leading_axes(shape):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*shape, 11, generator=generator)
    targets = torch.randint(0, 11, shape, generator=generator)
    expected = by_hand(logits, targets)
    torch.testing.assert_close(cross_entropy_loss(logits, targets).double(), expected.mean())
    torch.testing.assert_close(cross_entropy_loss(logits, targets, reduction="sum").double(), expected.sum())
    torch.testing.assert_close(cross_entropy_loss(logits, targets, reduction="none").double(), expected)


def test_logits_that_are_large_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert cross_entropy_loss(logits, torch.tensor([0, 1])).item() == 0.0
    assert cross_entropy_loss(logits, torch.tensor([1, 0])).item() == 1e4


def test_minus_100_is_ignored_in_the_sum_and_in_the_mean():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    targets = torch.tensor([1, IGNORE_INDEX, 3, IGNORE_INDEX])
    kept = by_hand(logits.detach()[[0, 2]], targets[[0, 2]])
    torch.testing.assert_close(cross_entropy_loss(logits, targets).double(), kept.mean())
    torch.testing.assert_close(cross_entropy_loss(logits, targets, reduction="sum").double(), kept.sum())
    assert cross_entropy_loss(logits, targets, reduction="none")[1].item() == 0.0
    cross_entropy_loss(logits, targets).backward()
    assert logits.grad is not None
    assert (logits.grad[[1, 3]] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


def test_another_id_can_be_ignored():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    with_padding = cross_entropy_loss(logits, torch.tensor([1, 0, 2]), ignore_index=0)
    torch.testing.assert_close(with_padding, cross_entropy_loss(logits[[0, 2]], torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="target -100 is not in"):
        cross_entropy_loss(logits, torch.tensor([1, IGNORE_INDEX, 2]), ignore_index=0)


@pytest.mark.parametrize("bad", [-1, -5, 5, 2**31])
def test_an_id_out_of_range_is_an_error_and_does_not_wrap_around(bad):
    with pytest.raises(ValueError, match=rf"target {bad} is not in 0 \.\. 4"):
        cross_entropy_loss(torch.zeros(2, 5), torch.tensor([1, bad]))


@pytest.mark.parametrize(
    ("logits", "targets"), [((1, 4, 5), (3, 4)), ((3, 4, 5), (1, 4)), ((4, 5), (4, 1)), ((5,), (1,))]
)
def test_batch_1_against_3_is_an_error_and_is_not_broadcast(logits, targets):
    with pytest.raises(ValueError, match=rf"need targets of shape \[.*\], got \[{targets[0]}"):
        cross_entropy_loss(torch.zeros(logits), torch.zeros(targets, dtype=torch.long))


def test_a_number_has_no_classes():
    with pytest.raises(ValueError, match="cross_entropy_loss"):
        cross_entropy_loss(torch.zeros(()), torch.zeros((), dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_targets_are_ids(dtype):
    with pytest.raises(ValueError, match=f"must be integer token ids, got {dtype}"):
        cross_entropy_loss(torch.zeros(2, 5), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_type_is_taken(dtype):
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([4, 1])
    assert torch.equal(cross_entropy_loss(logits, ids.to(dtype)), cross_entropy_loss(logits, ids))


def test_float64_stays_float64():
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = cross_entropy_loss(logits, torch.tensor([1, 2, 3]))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, by_hand(logits, torch.tensor([1, 2, 3])).mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened_before_the_sum(dtype):
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(2)).to(dtype)
    targets = torch.arange(64)
    loss = cross_entropy_loss(logits, targets, reduction="none")
    assert loss.dtype == torch.float32
    # the narrow numbers are exact in float64; only float32's own rounding is left
    torch.testing.assert_close(loss.double(), by_hand(logits, targets), rtol=1e-6, atol=0)


# --- head and loss in pieces ---------------------------------------------------------------------------------------


def problem(n: int, d: int, v: int, seed: int, ignored: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORE_INDEX)


def loss_and_gradients(hidden, weight, targets, chunk_tokens, scale=1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = head_loss_sum(hidden, weight, targets, chunk_tokens)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


def reference(hidden, weight, targets, scale=1.0):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


def assert_near(found: torch.Tensor, exact: torch.Tensor, relative: float) -> None:
    """Check that the difference is within `relative` times the largest entry, which bounds the rounding of a sum."""
    bound = relative * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    assert (found.double() - exact).abs().max().item() <= bound


@given(
    n=st.integers(1, 17),
    d=st.integers(1, 9),
    v=st.integers(1, 23),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([1.0, 0.125, 3.0]),
)
def test_pieces_give_the_plain_loss_and_both_gradients(n, d, v, chunk, seed, ignored, scale):
    case = problem(n, d, v, seed, ignored)
    exact = reference(*case, scale)
    for chunk_tokens in (None, chunk):
        found = loss_and_gradients(*case, chunk_tokens, scale)
        assert [x.dtype for x in found] == [torch.float32] * 3
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.shape == theirs.shape
            assert_near(ours, theirs, 2e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 12, 13])
def test_every_chunk_size_of_one_case(chunk):
    case = problem(13, 6, 31, seed=4, ignored=0.3)
    assert (case[2] == IGNORE_INDEX).any()
    assert (case[2] != IGNORE_INDEX).any()
    for ours, plain in zip(loss_and_gradients(*case, chunk), loss_and_gradients(*case, None), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 4])
def test_ignored_tokens_have_no_gradient(chunk):
    hidden, weight, targets = problem(10, 6, 31, seed=4, ignored=0.5)
    _, grad_hidden, _ = loss_and_gradients(hidden, weight, targets, chunk)
    ignored = targets == IGNORE_INDEX
    assert (grad_hidden[ignored] == 0).all()
    assert (grad_hidden[~ignored] != 0).any(dim=1).all()


@pytest.mark.parametrize("chunk", [None, 5])
def test_bf16_hidden_with_float32_weight(chunk):
    hidden, weight, targets = problem(24, 16, 64, seed=5, ignored=0.2)
    hidden, weight = hidden.bfloat16(), weight.bfloat16().float()
    loss, grad_hidden, grad_weight = loss_and_gradients(hidden, weight, targets, chunk)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = reference(hidden, weight, targets)
    # bfloat16 keeps 8 bits: its logits are off by up to 2^-9 of their size, and so are the probabilities
    for ours, theirs in zip((loss, grad_hidden, grad_weight), exact, strict=True):
        assert_near(ours, theirs, 0.02)


def test_bf16_pieces_are_as_good_as_bf16_in_one_piece():
    hidden, weight, targets = problem(64, 16, 64, seed=6, ignored=0.0)
    hidden = hidden.bfloat16()
    exact = reference(hidden, weight.bfloat16(), targets)
    in_one = loss_and_gradients(hidden, weight, targets, None)
    pieces = loss_and_gradients(hidden, weight, targets, 7)
    for one, cut, truth in zip(in_one, pieces, exact, strict=True):
        error_of_one = (one.double() - truth).norm()
        assert (cut.double() - truth).norm() <= 2 * error_of_one + 1e-6 * truth.norm()


@pytest.mark.parametrize("chunk", [None, 3])
def test_without_gradients_nothing_is_kept(chunk):
    hidden, weight, targets = problem(8, 4, 11, seed=7, ignored=0.2)
    loss = head_loss_sum(hidden, weight, targets, chunk)
    assert not loss.requires_grad
    with torch.no_grad():
        again = head_loss_sum(hidden.requires_grad_(), weight.requires_grad_(), targets, chunk)
    assert torch.equal(loss, again)


def test_pieces_never_make_all_logits():
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    hidden, weight, targets = problem(40, 2, 100, seed=8, ignored=0.0)
    with Watch():
        head_loss_sum(hidden, weight, targets, None)
    assert max(sizes) == 40 * 100  # the plain method does make all logits
    sizes.clear()
    with Watch():
        loss_and_gradients(hidden, weight, targets, 4)
    assert max(sizes) == 4 * 100


def test_without_a_chunk_size_pieces_have_at_most_so_many_logits(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets = torch.randn(10, 4), torch.randn(7, 4), torch.randint(0, 7, (10,))
    sizes = []

    def piece(logits, ids):
        sizes.append(list(logits.shape))
        return chunk_loss_and_grad(logits, ids)

    whole = head_loss_sum(hidden, weight, targets, None, piece)
    monkeypatch.setattr("tinytrain_dist.model.loss.MAX_CHUNK_LOGITS", 60)
    torch.testing.assert_close(head_loss_sum(hidden, weight, targets, None, piece), whole)
    assert sizes == [[10, 7], [3, 7], [3, 7], [3, 7], [1, 7]]  # halved until at most 30


def test_gradients_are_scaled_in_place_and_so_cannot_be_asked_for_twice():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = head_loss_sum(hidden, torch.randn(7, 4), torch.tensor([1, 2, 3]))
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_work_inside_autocast():
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets, found = torch.randint(0, 7, (8,)), []
    for narrow in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss = head_loss_sum(hidden, weight, targets, 3)
        found.append(torch.autograd.grad(loss, (hidden, weight)))
    for exact, cast in zip(*found, strict=True):
        torch.testing.assert_close(cast, exact, rtol=0.05, atol=0.05)


def test_losses_of_tokens_change_neither_the_sum_nor_the_gradients() -> None:
    """Eagerly not a bit, so runs that log losses by source are the runs that they were."""
    torch.manual_seed(0)
    results = []
    token_losses: list[torch.Tensor] = []
    for piece, kept in ((chunk_loss_and_grad, None), (chunk_token_losses_and_grad, token_losses)):
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
        weight = torch.randn(50, 8, generator=generator, requires_grad=True)
        targets = torch.randint(0, 50, (37,), generator=generator)
        targets[5] = IGNORE_INDEX
        loss = head_loss_sum(hidden, weight, targets, 10, piece, kept)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for without, with_losses in zip(*results, strict=True):
        assert torch.equal(without, with_losses)
    losses = torch.cat(token_losses)
    expected = cross_entropy_loss(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses[5] == 0
