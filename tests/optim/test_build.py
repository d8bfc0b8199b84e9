"""Which parameters of a model decay."""

from __future__ import annotations

from torch import nn

from tinytrain_dist.optim.build import weight_decay_groups


def test_decay_groups_put_matrices_apart_from_vectors():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    groups = weight_decay_groups(model, 0.1)
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.1, [(5, 3), (5, 3)]),
        (0.0, [(3,), (3,), (5,)]),
    ]


def test_decay_groups_leave_out_frozen_and_count_tied_weights_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    groups = weight_decay_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1]  # and no empty group
