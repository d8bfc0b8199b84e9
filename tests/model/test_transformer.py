"""Owns the checks of the network: equal to transformers' Llama and Qwen3 by our own config.json; its first weights.

Must not know training. transformers is the oracle; without it those tests are skipped, the others hold alone.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.attention import RotaryEmbedding, apply_rotary_pos_emb
from tinytrain_dist.model.hf_config import check_hf_config, to_hf_config
from tinytrain_dist.model.layers import Linear, RMSNorm, SwiGLU
from tinytrain_dist.model.transformer import TransformerBlock, TransformerLM

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks the network

SMALL = TrainingConfig(vocab_size=67, num_layers=2, num_heads=4, d_model=32, d_ff=48, context_len=64)
KINDS = {
    "plain": SMALL,
    "gqa": dataclasses.replace(SMALL, num_kv_heads=2),
    "tied": dataclasses.replace(SMALL, tie_embeddings=True, norm_eps=1e-3, rope_theta=500_000.0),
    "llama3": dataclasses.replace(
        SMALL, rope_scaling_factor=8.0, rope_original_context_len=32, rope_low_freq_factor=1.0, rope_theta=100.0
    ),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, head_dim=16, num_kv_heads=1),
    "qwen3 tied": dataclasses.replace(SMALL, qk_norm=True, tie_embeddings=True),
    "wide heads": dataclasses.replace(SMALL, head_dim=12, d_model=30, num_heads=5),
}
# (the vocabulary is a prime: nothing may rely on its divisors)


def random_model(config: TrainingConfig) -> TransformerLM:
    """A model whose every parameter differs from its neighbour, norm weights too, so that no mix-up stays unseen."""
    model = TransformerLM(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1 + (1.0 if param.ndim == 1 else 0.0))
    return model


def some_ids(config: TrainingConfig, batch: int = 3, length: int = 20) -> torch.Tensor:
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(12))


def write_folder(folder: Path, model: TransformerLM) -> Path:
    (folder / "config.json").write_text(json.dumps(to_hf_config(model.config)))
    save_file(
        {name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


# --- the oracle ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = KINDS[kind]
    ours = random_model(config)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        write_folder(tmp_path, ours),
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="eager",
    )
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert {n: p.dtype for n, p in theirs.named_parameters()} == {n: torch.float32 for n, _ in ours.named_parameters()}

    ids = some_ids(config, length=48)
    found = ours(ids)
    expected = theirs(ids).logits
    assert found.shape == (3, 48, 67)
    assert expected.std() > 0.1  # or nearness would say little
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    targets = some_ids(config, length=48).flip(1)
    ours(ids, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for name, param in ours.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(param.grad, gradients[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_each_kind_differs_from_plain():
    # or the comparison above would compare the same model several times
    ids = some_ids(SMALL, length=48)
    assert len({json.dumps(to_hf_config(config), sort_keys=True) for config in KINDS.values()}) == len(KINDS)
    plain, scaled = (random_model(KINDS[kind])(ids) for kind in ("plain", "llama3"))
    theta = random_model(dataclasses.replace(KINDS["llama3"], rope_scaling_factor=None, rope_original_context_len=None))
    assert not torch.allclose(scaled, theta(ids), atol=1e-3)
    assert not torch.allclose(plain, theta(ids), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_config_is_taken_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = KINDS[kind]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(to_hf_config(config)))
    check_hf_config(config, tmp_path / "ours")
    transformers.AutoConfig.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    check_hf_config(config, tmp_path / "theirs")


def test_the_end_token_is_told():
    assert to_hf_config(SMALL)["eos_token_id"] is None
    assert to_hf_config(SMALL, eos_id=5)["eos_token_id"] == 5


# --- what a folder of another model must be ------------------------------------------------------------------------


def fits(tmp_path: Path, config: TrainingConfig, **changes: object) -> list[str]:
    """The problems that check_fits names when config.json of `config` has these changes; None takes a key away."""
    theirs = {**to_hf_config(config), **changes}
    theirs = {key: value for key, value in theirs.items() if value is not None or key not in changes}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    try:
        check_hf_config(config, tmp_path)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("model_type", "mistral", "llama or qwen3"),
        ("hidden_act", "gelu", "silu"),
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("use_sliding_window", True, "False"),
        ("quantization_config", {"bits": 4}, "None"),
        ("partial_rotary_factor", 0.5, "1 or 1.0"),
    ],
)
def test_what_the_model_cannot_represent_is_refused_by_name(tmp_path, key, value, needs):
    assert fits(tmp_path, SMALL, **{key: value}) == [
        f"{key}: {value!r} is not something this model has; it needs {needs}"
    ]


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_other_rotary_scalings_are_refused(tmp_path, where):
    scaling = {"rope_parameters": None, "rope_scaling": None, where: {"rope_type": "yarn", "factor": 2.0}}
    (problem,) = fits(tmp_path, SMALL, **scaling)
    assert problem == "rope_type: 'yarn' is not something this model has; it needs default or llama3"


@pytest.mark.parametrize(
    ("key", "value", "setting", "here"),
    [
        ("vocab_size", 68, "vocab_size", 67),
        ("hidden_size", 64, "d_model", 32),
        ("intermediate_size", 64, "d_ff", 48),
        ("num_hidden_layers", 3, "num_layers", 2),
        ("num_attention_heads", 8, "num_heads", 4),
        ("num_key_value_heads", 2, "num_kv_heads", 4),
        ("head_dim", 16, "head_dim", 8),
        ("rms_norm_eps", 1e-6, "norm_eps", 1e-5),
        ("tie_word_embeddings", True, "tie_embeddings", False),
    ],
)
def test_a_size_that_differs_says_both_and_what_to_set(tmp_path, key, value, setting, here):
    path = tmp_path / "config.json"
    assert fits(tmp_path, SMALL, **{key: value}) == [
        f"{setting}: {here} here, but {path} has {value}; set {setting} = {value}"
    ]


def test_the_folder_is_named(tmp_path):
    fits(tmp_path, SMALL, vocab_size=1)
    with pytest.raises(ConfigError) as caught:
        check_hf_config(SMALL, tmp_path)
    assert caught.value.source == f"init_from = {tmp_path}"


def test_everything_that_differs_is_said_at_once(tmp_path):
    problems = fits(tmp_path, SMALL, vocab_size=1, hidden_act="relu", rope_parameters={"rope_theta": 5.0})
    assert [problem.split(":")[0] for problem in problems] == ["hidden_act", "vocab_size", "rope_theta"]


def test_query_norms_and_scaling_must_agree(tmp_path):
    assert [p.split(":")[0] for p in fits(tmp_path, SMALL, model_type="qwen3")] == ["qk_norm"]
    assert [p.split(":")[0] for p in fits(tmp_path, KINDS["qwen3"], model_type="llama")] == ["qk_norm"]
    scaled = {**to_hf_config(KINDS["llama3"])["rope_parameters"], "rope_theta": 10_000.0}
    problems = fits(tmp_path, SMALL, rope_parameters=scaled)
    assert [p.split(":")[0] for p in problems] == ["rope_scaling_factor", "rope_original_context_len"]
    # and the other way round: a scaling here that the weights were not trained with
    plain = {"rope_type": "default", "rope_theta": 100.0}
    problems = fits(tmp_path, KINDS["llama3"], rope_parameters=plain, rope_scaling=None)
    assert [p.split(":")[0] for p in problems] == ["rope_scaling_factor", "rope_original_context_len"]


def test_keys_left_out_have_transformers_defaults(tmp_path):
    """Llama's config.json before 2024 has neither head_dim nor rope settings, and defaults differ from ours."""
    older = {"head_dim": None, "rope_parameters": None, "rope_scaling": None, "rope_theta": None}
    assert fits(tmp_path, SMALL, **older, num_key_value_heads=None, tie_word_embeddings=None) == []
    (problem,) = fits(tmp_path, SMALL, rms_norm_eps=None)
    assert problem == f"norm_eps: 1e-05 here, but {tmp_path / 'config.json'} has 1e-06; set norm_eps = 1e-06"
    assert [p.split(":")[0] for p in fits(tmp_path, KINDS["tied"], tie_word_embeddings=None)] == ["tie_embeddings"]
    assert [p.split(":")[0] for p in fits(tmp_path, KINDS["gqa"], num_key_value_heads=None)] == ["num_kv_heads"]


@pytest.mark.parametrize(
    "text",
    ['{"model_type": "gpt2", "n_embd": 768, "n_head": 12}', "{}", "[]", "{", '{"model_type": "llama"}'],
)
def test_a_folder_of_something_else_is_a_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read|hidden_size: is missing in"):
        check_hf_config(SMALL, tmp_path)


def test_no_folder_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"init_from: .*config\.json cannot be read"):
        check_hf_config(SMALL, tmp_path / "none")


# --- first weights -------------------------------------------------------------------------------------------------

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
GOLDEN = [-0.009760833345353603, 0.009990837424993515, -0.00790124200284481]


def test_first_weights_are_pinned():
    found = TransformerLM(SMALL).get_parameter(WEIGHT).flatten()[:3].tolist()
    assert found == pytest.approx(GOLDEN, rel=0, abs=1e-9), (
        f"The first three numbers of {WEIGHT} for seed 0 are {found}. All runs from scratch now start elsewhere, and "
        "no earlier curve can be repeated. If numpy's generator changed, that must be worked around; if the rule of "
        "initialisation was changed on purpose, say so in CHANGELOG.md and put the new numbers here."
    )


def test_first_weights_do_not_depend_on_the_order_in_which_they_are_made():
    model = TransformerLM(SMALL)
    names = [(name, param.shape) for name, param in model.named_parameters()]
    backwards = {name: model.initial_weight(name, shape) for name, shape in reversed(names)}
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), backwards[name]), name


def test_first_weights_do_not_depend_on_torchs_seed_nor_leave_a_trace():
    torch.manual_seed(1)
    one = TransformerLM(SMALL).state_dict()
    torch.manual_seed(2)
    two = TransformerLM(SMALL).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_deeper_model_begins_with_the_same_matrices():
    shallow, deep = (
        TransformerLM(SMALL).state_dict(),
        TransformerLM(dataclasses.replace(SMALL, num_layers=3)).state_dict(),
    )
    residual = ("o_proj.weight", "down_proj.weight")  # scaled by depth
    assert all(torch.equal(deep[n], w) for n, w in shallow.items() if not n.endswith(residual))
    torch.testing.assert_close(
        deep["model.layers.0.mlp.down_proj.weight"] * 3**0.5, shallow["model.layers.0.mlp.down_proj.weight"] * 2**0.5
    )


def test_each_name_and_each_seed_has_its_own_weights():
    seen = {}
    for seed in (0, 1):
        for name, param in TransformerLM(dataclasses.replace(SMALL, seed=seed)).named_parameters():
            if param.ndim >= 2:
                digest = hashlib.sha256(param.detach().flatten()[:64].sign().numpy().tobytes()).hexdigest()
                assert digest not in seen, ((seed, name), seen[digest])
                seen[digest] = (seed, name)
    assert len(seen) == 2 * (2 + 7 * 2)


def test_names_that_concatenate_alike_have_their_own_weights():
    one, ten = (TransformerLM(dataclasses.replace(SMALL, seed=seed)) for seed in (1, 11))
    assert not torch.equal(one.initial_weight("1.x", torch.Size([2, 2])), ten.initial_weight(".x", torch.Size([2, 2])))


def test_standard_deviations_and_ones():
    config = dataclasses.replace(SMALL, d_model=128, num_heads=4, d_ff=256, vocab_size=500, num_layers=8, qk_norm=True)
    for name, param in TransformerLM(config).named_parameters():
        if param.ndim == 1:
            assert (param == 1).all(), name
            continue
        expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        count = param.numel()
        assert param.std().item() == pytest.approx(expected, rel=5 / (2 * count) ** 0.5), name
        assert abs(param.mean().item()) < 5 * expected / count**0.5, name


def test_an_untrained_model_knows_nothing():
    loss = TransformerLM(SMALL)(some_ids(SMALL), some_ids(SMALL).flip(0)).item() / 60
    assert loss == pytest.approx(torch.tensor(67.0).log().item(), abs=0.1)


def test_a_model_on_meta_is_the_same_after_it_is_made():
    with torch.device("meta"):
        model = TransformerLM(KINDS["tied"])
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights()
    expected = TransformerLM(KINDS["tied"])
    for (name, a), (other, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert torch.equal(model(some_ids(SMALL)), expected(some_ids(SMALL)))


def test_tied_weights_are_one_parameter():
    model = TransformerLM(KINDS["tied"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    untied = TransformerLM(SMALL)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_nothing_but_parameters_is_kept():
    assert list(TransformerLM(KINDS["llama3"]).buffers()) == []


def test_a_model_needs_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        TransformerLM(dataclasses.replace(SMALL, vocab_size=None))


# --- the network's own rules ---------------------------------------------------------------------------------------


def test_the_future_is_not_seen():
    model, ids = random_model(SMALL), some_ids(SMALL)
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 67
    one, two = model(ids), model(changed)
    assert torch.equal(one[:, :10], two[:, :10])
    assert (one[:, 10:] != two[:, 10:]).any(dim=2).all()


def test_sequences_of_a_batch_do_not_see_each_other():
    model, ids = random_model(SMALL), some_ids(SMALL)
    together = model(ids)
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_with_targets_the_model_gives_the_summed_loss(kind, chunk):
    model = random_model(dataclasses.replace(KINDS[kind], loss_chunk_tokens=chunk))
    ids, targets = some_ids(SMALL), some_ids(SMALL).flip(1)
    targets[0, 3:9] = -100
    loss = model(ids, targets)
    expected = F.cross_entropy(model(ids).double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


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


def test_the_public_signatures():
    names = list(inspect.signature(RotaryEmbedding).parameters)
    assert names[:2] == ["dim", "theta"]
    assert list(inspect.signature(TransformerLM).parameters) == ["config"]
    assert next(iter(inspect.signature(TransformerLM.forward).parameters)) == "self"
    assert list(inspect.signature(SwiGLU).parameters) == ["d_model", "d_ff"]


def test_swiglu_by_hand():
    layer = SwiGLU(3, 5)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    gate, up, down = (m.weight for m in (layer.gate_proj, layer.up_proj, layer.down_proj))
    expected = ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(layer(x), expected)


def test_a_block_keeps_shape_and_type():
    block = TransformerBlock(SMALL)
    cos, sin = RotaryEmbedding(8)(torch.arange(6))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert (block(x, cos, sin).dtype, block(x, cos, sin).shape) == (dtype, x.shape)


def test_rms_norm_by_hand():
    norm = RMSNorm(4, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    expected = x / (30 / 4 + 0.5) ** 0.5 * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_takes_its_mean_in_float32():
    x = torch.full((1, 4096), 0.1).bfloat16()
    x[0, 0] = 30.0
    exact = x.double() / (x.double().square().mean() + 1e-5).sqrt()
    assert torch.equal(RMSNorm(4096)(x), exact.bfloat16())


@pytest.mark.parametrize("make", [lambda: RMSNorm(33), lambda: Linear(33, 17), lambda: SwiGLU(33, 20)])
def test_layers_give_the_same_bits_when_a_wrapper_has_cast_the_weights(make):
    layer = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    x = torch.randn(5, 33, generator=generator).bfloat16()
    wide = layer(x)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(layer.bfloat16()(x), wide)


def test_a_bf16_model_gives_the_same_bits_when_its_weights_were_cast():
    config = dataclasses.replace(SMALL, precision="bf16", qk_norm=True)
    model, ids, targets = random_model(config), some_ids(SMALL), some_ids(SMALL).flip(1)
    logits, loss = model(ids), model(ids, targets)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    cast = random_model(config).bfloat16()
    assert torch.equal(cast(ids), logits)
    assert torch.equal(cast(ids, targets), loss)


def test_bf16_is_near_float32():
    ids, targets = some_ids(SMALL), some_ids(SMALL).flip(1)
    exact = random_model(SMALL)(ids, targets)
    narrow = random_model(dataclasses.replace(SMALL, precision="bf16"))(ids, targets)
    assert narrow != exact
    torch.testing.assert_close(narrow, exact, rtol=0.01, atol=0)


def test_gradients_of_a_bf16_model_are_float32():
    model = TransformerLM(dataclasses.replace(SMALL, precision="bf16"))
    model(some_ids(SMALL), some_ids(SMALL)).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters())


# --- how much work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_hand(tied):
    config = TrainingConfig(
        vocab_size=100, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10, d_model=24, d_ff=50, context_len=16,
        tie_embeddings=tied, qk_norm=True,
    )  # fmt: skip
    attention = 24 * 40 + 24 * 20 + 24 * 20 + 40 * 24
    feed_forward = 3 * 24 * 50
    matrices = 3 * (attention + feed_forward) + 24 * 100
    # scores and their use: 2 products x 2 operations x 3 (forward, twice in backward) over half the positions
    scores = 3 * 2 * 2 * 3 * 4 * 10 * 16 / 2
    assert TransformerLM(config).flops_per_token() == 6 * matrices + scores


def test_a_model_of_other_modules_can_use_the_parts():
    layer = nn.Sequential(RMSNorm(6), Linear(6, 4))
    assert layer(torch.ones(2, 6)).shape == (2, 4)


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
