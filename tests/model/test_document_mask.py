"""Attention within documents: a packed window equals its documents one by one, on a CPU and in the form of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tinytrain_dist.config.model_config import ModelConfig
from tinytrain_dist.data.batches import split_micro_batches
from tinytrain_dist.data.training_windows import Windows, separate_documents
from tinytrain_dist.model import document_mask
from tinytrain_dist.model.attention import causal_attention
from tinytrain_dist.model.document_mask import attention_mask, block_mask, dense_mask, positions_in_documents
from tinytrain_dist.model.matmul import simulate_device
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing

CONTEXT_LEN = 40
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"num_heads": 4, "d_model": 32},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "d_model": 64, "qk_norm": True, "tie_embeddings": True},
}


def random_windows(seed: int, rows: int = 3, length: int = CONTEXT_LEN, rate: float = 0.15) -> Windows:
    """Return windows of documents of random lengths, some of one token; one window is a single document."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, length + 1, generator=generator) < rate
    begins[-1] = False
    return separate_documents(torch.randint(0, 53, (rows, length + 1), generator=generator), begins)


def model_arguments(windows: Windows) -> tuple[Tensor, ...]:
    (arguments,) = split_micro_batches(windows, len(windows), torch.device("cpu"))
    return arguments


def documents_of(windows: Windows) -> list[Tensor]:
    """Return the tokens of each document, cut from the windows. The last token of a window belongs to its last one."""
    assert windows.documents is not None
    assert windows.counted is not None
    found = []
    for tokens, documents, counted in zip(windows.tokens, windows.documents, windows.counted, strict=True):
        for number in documents.unique().tolist():
            own = tokens[:-1][documents == number]
            last = number == int(documents[-1]) and bool(counted[-1])
            found.append(torch.cat([own, tokens[-1:]]) if last else own)
    return found


def small_model(name: str, dtype: torch.dtype) -> TransformerLM:
    config = ModelConfig(vocab_size=53, num_layers=2, context_len=CONTEXT_LEN, **MODELS[name])
    return TransformerLM(config, precision=dtype).to(dtype)


def loss_and_grads(model: TransformerLM, *arguments: Tensor) -> tuple[Tensor, ...]:
    loss = model(*arguments)
    return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))


# --- the oracle: each document alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(
    name: str, dtype: torch.dtype, checkpointing: str
) -> None:
    windows = random_windows(1)
    model = small_model(name, dtype)
    parts = [loss_and_grads(model, ids[None, :-1], ids[None, 1:]) for ids in documents_of(windows) if len(ids) > 1]
    expected = [torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True)]
    for block in model.model.layers:
        apply_activation_checkpointing(block, checkpointing)
    found = loss_and_grads(model, *model_arguments(windows))
    exact = dtype == torch.float64
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)  # the loss is a sum in float32
    for grad, expected_grad in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12 if exact else 1e-4)
    unmasked = model(*model_arguments(windows)[:2])
    assert abs(unmasked - expected[0]) > 1e-2, "the mask must matter"


def test_logits_of_a_window_of_one_document_are_those_without_documents() -> None:
    model = small_model("grouped", torch.float32)
    ids = torch.randint(0, 53, (2, CONTEXT_LEN))
    found = model(ids, None, torch.full_like(ids, 3, dtype=torch.int32))
    torch.testing.assert_close(found, model(ids), rtol=1e-5, atol=1e-6)


def test_positions_restart_in_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert positions_in_documents(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0] * 6, [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("t", [5, 128, 300])
def test_short_blocks_of_masked_attention_equal_the_kernel(monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    monkeypatch.setattr("tinytrain_dist.model.matmul.CPU_LACKS_BF16", False)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, t, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    windows = random_windows(2, 2, t)
    assert windows.documents is not None
    mask = dense_mask(windows.documents, torch.bfloat16)
    weights = torch.randn(2, 4, t, 8)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        y = causal_attention(q, k, v, mask)
        results.append((y, *torch.autograd.grad((y.float() * weights).sum(), (q, k, v))))
    for kernel, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, kernel, rtol=0.05, atol=0.06)
    assert any(not torch.equal(a, b) for a, b in zip(*results, strict=True)), "both ways must have been taken"


# --- the form of a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let FlexAttention compute gradients on a CPU, which torch refuses although its plain formula can."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    with simulate_device("cuda"):
        yield
    torch._dynamo.reset()


def test_the_form_of_the_mask_is_chosen_by_the_target_device() -> None:
    documents, x = torch.zeros(1, 8, dtype=torch.int32), torch.empty(1, 8, 32)
    assert isinstance(attention_mask(documents, x, 16), Tensor)
    with simulate_device("cuda"):
        assert type(attention_mask(documents, x, 16)).__name__ == "BlockMask"
        assert isinstance(attention_mask(documents, x, 8), Tensor)  # FlexAttention has no kernel for it


@pytest.mark.parametrize("t", [1, 100, 128, 300, 640])
@pytest.mark.parametrize("rate", [0.0, 0.005, 0.05, 1.0])
def test_the_mask_of_blocks_is_the_one_that_torch_makes_of_all_pairs(t: int, rate: float) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    documents = random_windows(t, 3, t, rate).documents
    assert documents is not None
    found = block_mask(documents)
    expected = create_block_mask(document_mask._mask_of_pairs(documents), 3, None, t, t, device="cpu")
    assert found.seq_lengths == expected.seq_lengths
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for kind in ("", "full_"):
        counts, lists = getattr(found, f"{kind}kv_num_blocks"), getattr(found, f"{kind}kv_indices")
        used = torch.arange(lists.shape[-1]) < counts[..., None]
        assert torch.equal(lists[used], getattr(expected, f"{kind}kv_indices")[used])


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_of_a_gpu_equals_that_of_a_cpu() -> None:
    torch.manual_seed(0)
    windows = random_windows(3, 2, 200, 0.03)
    assert windows.documents is not None
    q, k, v = (torch.randn(2, heads, 200, 16).requires_grad_() for heads in (4, 2, 2))
    weights = torch.randn(2, 4, 200, 16)
    results = []
    for mask in (block_mask(windows.documents), dense_mask(windows.documents, torch.float32)):
        y = causal_attention(q, k, v, mask)
        results.append((y, *torch.autograd.grad((y * weights).sum(), (q, k, v))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


# --- torch.compile -------------------------------------------------------------------------------------------------


def compile_blocks(model: TransformerLM) -> None:
    """Compile as a run does, but let the graph be computed by torch's own operators: that takes a second."""
    for block in model.model.layers:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")


def assert_one_graph(dtype: torch.dtype) -> None:
    """Check that batches with other documents need no second graph, and give the results of eager code on a CPU."""
    model, eager = small_model("grouped", dtype).float(), small_model("grouped", dtype).float()
    compile_blocks(model)
    graphs = []
    for seed, rate in ((0, 0.1), (1, 0.0), (2, 0.7)):
        arguments = model_arguments(random_windows(seed, 2, rate=rate))
        found = loss_and_grads(model, *arguments)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        with simulate_device("cpu"):
            expected = loss_and_grads(eager, *arguments)
        rounding = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
        torch.testing.assert_close(found, expected, **rounding)  # type: ignore[arg-type]
    assert graphs == [1, 1, 1]


@pytest.fixture
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own compiler reads it
@pytest.mark.usefixtures("no_graphs")
def test_other_documents_need_no_second_graph(dtype: torch.dtype) -> None:
    assert_one_graph(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own compiler reads it
@pytest.mark.usefixtures("flex_on_cpu", "no_graphs")
def test_other_documents_need_no_second_graph_in_the_form_of_a_gpu(dtype: torch.dtype) -> None:
    assert_one_graph(dtype)
