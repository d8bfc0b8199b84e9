"""The loss is divided by the targets that count, with uneven masks and documents, to the same bits on any layout."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, VOCABULARY
from tinytrain_dist.data.training_windows import Windows, separate_documents

pytestmark = pytest.mark.multiprocess

LAYOUTS: dict[int, list[tuple[str, int, int]]] = {
    1: [("none", 1, 1), ("fsdp", 1, 1)],
    2: [("ddp", 2, 1), ("fsdp", 1, 2)],
    3: [("ddp", 3, 1), ("fsdp", 1, 3)],  # shares of 1, 1 and 2 micro-batches
    4: [("ddp", 4, 1), ("fsdp", 1, 4), ("hsdp", 2, 2)],
}
MASKED: dict[str, Any] = {"loss_mask": True, "document_mask": True, "compile": False, "vocab_size": VOCABULARY}
EXACT: list[dict[str, Any]] = [
    {**MASKED, "reproducible": True, "micro_batch_size": 2},
    {**MASKED, "reproducible": True, "micro_batch_size": 1, "activation_checkpointing": "block"},
    {**MASKED, "reproducible": True, "micro_batch_size": 2, "precision": "bf16", "tie_embeddings": True},
]
NATIVE = {**MASKED, "micro_batch_size": 2}
EMPTY_STEP = 2


def global_windows(step: int) -> Windows:
    """Return the windows of the 8 slots: slot 1 and the micro-batch of slots 4 and 5 are empty, or the whole batch."""
    generator = torch.Generator().manual_seed(step)
    shape = (8, TINY["context_len"] + 1)
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator).int()
    counted = torch.rand(8, shape[1] - 1, generator=generator) < torch.rand(8, 1, generator=generator)
    counted[[1, 4, 5]] = False
    if step == EMPTY_STEP:
        counted[:] = False
    return separate_documents(tokens, torch.rand(shape, generator=generator) < 0.2, counted)


class BatchesOfSlots:
    def __init__(self, slots: list[int]) -> None:
        self.slots = slots

    def get(self, step: int) -> Windows:
        whole = global_windows(step)
        assert whole.counted is not None
        assert whole.documents is not None
        return Windows(whole.tokens[self.slots], whole.counted[self.slots], whole.documents[self.slots])


def train_all(variants: list[dict[str, Any]]) -> dict[tuple[str, int], list[Any]]:
    """On a rank: for each layout and variant, return loss and norm of each step, and the weights or their digest."""
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.parallel.wrappers import gather_full_state_dict
    from tinytrain_dist.training.train_step import build_train_step

    torch.set_num_threads(1)
    context = init_distributed("cpu")
    results: dict[tuple[str, int], list[Any]] = {}
    for mode, replicate, shard in LAYOUTS[context.world_size]:
        meshed = context.with_mesh(ParallelDims(mode, replicate, shard, ""))  # type: ignore[arg-type]
        for number, variant in enumerate(variants):
            step = build_train_step(TrainingConfig(**{**TINY, **variant}), meshed)
            batches = BatchesOfSlots(list(step.share(0).slots))
            numbers = [step.run(index, batches).numbers.read() for index in range(4)]
            weights = gather_full_state_dict(step.model)
            if variant.get("reproducible"):
                whole = b"".join(value.numpy().tobytes() for value in weights.values())
                results[mode, number] = [numbers, hashlib.sha256(whole).hexdigest()]
            else:
                results[mode, number] = [numbers, {name: value.tolist() for name, value in weights.items()}]
    return results


@cache
def results_of(world_size: int) -> dict[tuple[str, int], list[Any]]:
    by_rank = run_ranks(world_size, train_all, [*EXACT, NATIVE])
    assert all(result == by_rank[0] for result in by_rank), "all ranks know the same numbers"
    first: dict[tuple[str, int], list[Any]] = by_rank[0]
    return first


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_uneven_masks_give_the_same_bits_on_any_layout(world_size: int) -> None:
    for (mode, variant), found in results_of(world_size).items():
        if variant < len(EXACT):
            assert found == results_of(1)["none", variant], (mode, variant)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_native_sums_agree_with_one_process(world_size: int) -> None:
    expected_numbers, expected_weights = results_of(1)["none", len(EXACT)]
    for mode, _, _ in LAYOUTS[world_size]:
        numbers, weights = results_of(world_size)[mode, len(EXACT)]
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected_numbers), rtol=1e-5, atol=0)
        for name, values in weights.items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(expected_weights[name]), rtol=2e-4, atol=2e-6)


def test_a_batch_in_which_no_target_counts_has_loss_and_gradient_zero_and_is_not_skipped() -> None:
    for numbers, _ in results_of(2).values():
        assert numbers[EMPTY_STEP] == [0.0, 0.0, 0.0]
        assert all(loss > 1 and norm > 0 and not skipped for loss, norm, skipped in (numbers[1], numbers[3]))
