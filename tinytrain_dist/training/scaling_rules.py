"""Choose the size, the batch and the learning rate of a run by published scaling rules.

Pure functions of numbers. Must not know devices, files or how a speed was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tinytrain_dist.config.model_config import ModelConfig

TOKENS_PER_PARAMETER = 20  # of a compute-optimal run: Hoffmann et al. 2022 (arXiv 2203.15556)
MAX_EPOCHS = 4  # up to here, repeated data is almost as good as new data: Muennighoff et al. 2023 (arXiv 2305.16264)
HEAD_WIDTH = 64  # as in GPT-2 and in the smaller models of GPT-3
# Width per layer. Between 30 and 300, the loss hardly depends on it: Kaplan et al. 2020 (arXiv 2001.08361), figure 5.
WIDTH_PER_LAYER = 64
MAX_LAYERS = 128
MIN_LAYERS = 2
# parameters up to which a context length is proposed; a convention, not a rule: GPT-2 has 1,024 and Llama 2,048
CONTEXT_LENGTHS = ((1e7, 128), (5e7, 256), (1e9, 1024), (math.inf, 2048))


@dataclass(frozen=True)
class Budget:
    """What limits a run: the FLOPs that its time allows, and the tokens that there are to train on."""

    flops: float
    data_tokens: int

    @property
    def most_tokens(self) -> float:
        """Tokens that may be trained on: the data, repeated at most MAX_EPOCHS times."""
        return MAX_EPOCHS * self.data_tokens


def model_of(num_layers: int, vocab_size: int) -> ModelConfig:
    """Return the model of this depth: its width, heads and context length follow."""
    width = WIDTH_PER_LAYER * num_layers
    model = ModelConfig(vocab_size=vocab_size, num_layers=num_layers, num_heads=width // HEAD_WIDTH, d_model=width)
    parameters = model.approximate_parameter_count
    context_len = next(length for most, length in CONTEXT_LENGTHS if parameters <= most)
    return replace(model, context_len=context_len)


def flops_per_token(model: ModelConfig) -> float:
    """Return the FLOPs of forward and backward for one token, as TransformerLM.flops_per_token counts them."""
    looked_up = 0 if model.tie_embeddings else (model.vocab_size or 0) * model.d_model
    attention = 6.0 * model.num_layers * model.num_heads * model.head_width * model.context_len
    return 6.0 * (model.approximate_parameter_count - looked_up) + attention


def trained_tokens(model: ModelConfig, budget: Budget) -> float:
    """Return how many tokens the budget allows this model to be trained on."""
    return min(budget.flops / flops_per_token(model), budget.most_tokens)


def best_model(vocab_size: int, budget: Budget) -> ModelConfig:
    """Return the model that the budget trains on nearest to TOKENS_PER_PARAMETER tokens for each parameter."""
    models = [model_of(num_layers, vocab_size) for num_layers in range(MIN_LAYERS, MAX_LAYERS + 1)]

    def distance(model: ModelConfig) -> float:
        tokens = trained_tokens(model, budget)
        return abs(math.log(tokens / model.approximate_parameter_count / TOKENS_PER_PARAMETER))

    return min(models, key=distance)


def batch_tokens(flops: float) -> float:
    """Return the best tokens in a step for a run of so many FLOPs. Source: DeepSeek LLM 2024 (arXiv 2401.02954)."""
    return 0.2920 * float(flops**0.3271)


def highest_learning_rate(flops: float) -> float:
    """Return the best learning rate of AdamW for a run of so many FLOPs. Source: as for `batch_tokens`."""
    return 0.3118 * float(flops**-0.1250)


def batch_sequences(tokens: float, context_len: int, ranks: int) -> int:
    """Return the number of sequences nearest to so many tokens that is a power of two on each rank."""
    per_rank = tokens / context_len / ranks
    doublings = max(0, round(math.log2(max(per_rank, 1))))
    return ranks * (1 << doublings)
