"""Check ModelConfig: its defaults and derived sizes, and the number of weights."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.config.schema import TrainingConfig


def test_replace_of_d_model_gives_a_new_ffn_dim():
    small = TrainingConfig(d_model=256)
    assert small.ffn_dim == 704  # 8/3 x 256 = 682.67, up to a multiple of 64
    large = dataclasses.replace(small, d_model=512)
    assert large.ffn_dim == 1408
    assert large.d_ff is None
    assert dataclasses.replace(large, d_ff=100).ffn_dim == 100


@given(st.integers(1, 4096))
def test_ffn_dim_is_the_next_multiple_of_64(half_width):
    d_model = 2 * half_width
    ffn_dim = TrainingConfig(d_model=d_model, num_heads=1).ffn_dim
    assert ffn_dim % 64 == 0
    assert ffn_dim * 3 >= 8 * d_model > (ffn_dim - 64) * 3
