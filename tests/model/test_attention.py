"""Check rotary positions, and attention in blocks against torch's kernel."""

import pytest
import torch

from tinytrain_dist.model.attention import RotaryEmbedding, apply_rotary_pos_emb


def test_rotation_depends_on_distance_only():
    rotary = RotaryEmbedding(8, 100.0)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, 30, 8) for _ in range(2))
    q, k = apply_rotary_pos_emb(q, k, *rotary(torch.arange(30)))
    scores = (q @ k.transpose(2, 3))[0, 0]
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert abs(scores[5, 0] - scores[0, 0]) > 1e-3
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[..., :1].expand(1, 1, 30), rtol=1e-5, atol=0)


def test_rotation_of_one_pair_by_hand():
    cos, sin = RotaryEmbedding(2)(torch.tensor([0, 1]))
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    turned, _ = apply_rotary_pos_emb(x, x, cos, sin)
    one = torch.tensor(1.0)
    torch.testing.assert_close(
        turned[0, 0], torch.stack([torch.tensor([1.0, 0.0]), torch.stack([one.cos(), one.sin()])])
    )


def test_a_head_must_have_pairs():
    with pytest.raises(ValueError, match="dim must be even, got 3"):
        RotaryEmbedding(3)


@pytest.mark.parametrize("t", [5, 128, 300])
def test_short_blocks_of_attention_equal_the_kernel(monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    from tinytrain_dist.model.attention import causal_attention

    monkeypatch.setattr("tinytrain_dist.model.matmul.CPU_LACKS_BF16", False)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, t, 8).bfloat16().requires_grad_() for _ in range(3))
    weights = torch.randn(2, 3, t, 8)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        y = causal_attention(q, k, v)
        results.append((y, *torch.autograd.grad((y.float() * weights).sum(), (q, k, v))))
    for kernel, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, kernel, rtol=0.05, atol=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(*results, strict=True)), "both ways must have been taken"


@pytest.mark.parametrize("at_once", [1 << 24, 64])  # all scores of a window, or two rows
def test_the_largest_score_is_that_of_the_pairs_that_attend(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    from tinytrain_dist.model import attention

    monkeypatch.setattr(attention, "MAX_SCORES", at_once)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(3, heads, 8, 6, generator=generator) for heads in (4, 2))
    # the largest score is that of a later token, and the next one crosses documents
    q[0, 0], q[0, 2] = q[0, 0] / 100, q[0, 2] / 100
    q[0, 0, 2] = k[0, 0, 6] = 4.0
    q[0, 2, 4] = k[0, 1, 2] = 3.0
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]])
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) / 6**0.5
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    within = causal & (documents[:, :, None] == documents[:, None, :])
    expected = scores.masked_fill(~causal, -torch.inf).amax()
    torch.testing.assert_close(attention.largest_score(q, k), expected)
    expected_within = scores.masked_fill(~within[:, None], -torch.inf).amax()
    torch.testing.assert_close(attention.largest_score(q, k, documents), expected_within)
    assert scores.max() > expected > expected_within
