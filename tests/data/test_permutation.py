"""Permutations: every element once, another order for each key, no visible pattern, and the same on every platform."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from tinytrain_dist.data.permutation import MAX_LENGTH, ROUNDS, Permutation

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 4095, 4096, 4097, 65_537, 1_000_000)


def keys(number: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=number).random_raw(ROUNDS)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_element_appears_once_and_the_inverse_finds_it(length: int) -> None:
    indices = np.arange(length)
    elements = Permutation(length, keys(7)).apply(indices)
    assert np.array_equal(np.sort(elements), indices)
    assert np.array_equal(Permutation(length, keys(7)).invert(elements), indices)


@pytest.mark.parametrize("length", [(1 << 40) - 1, 1 << 40, (1 << 40) + 1, MAX_LENGTH])
def test_long_permutations_are_one_to_one(length: int) -> None:
    indices = np.unique(np.random.default_rng(0).integers(0, length, 20_000))
    permutation = Permutation(length, keys(3))
    elements = permutation.apply(indices)
    assert len(np.unique(elements)) == len(indices)
    assert elements.min() >= 0
    assert elements.max() < length
    assert np.array_equal(permutation.invert(elements), indices)


def test_an_element_does_not_depend_on_the_others_asked_for() -> None:
    permutation = Permutation(1000, keys(1))
    whole = permutation.apply(np.arange(1000))
    assert np.array_equal(permutation.apply(np.array([999, 3, 3, 500])), whole[[999, 3, 3, 500]])
    assert permutation.apply(np.array([], np.int64)).tolist() == []


def test_every_word_of_the_key_changes_the_order() -> None:
    orders = [keys(1)] + [keys(1) ^ np.eye(ROUNDS, dtype=np.uint64)[word] for word in range(ROUNDS)]
    assert len({tuple(Permutation(1000, key).apply(np.arange(1000)).tolist()) for key in orders}) == ROUNDS + 1


def chi_square(counts: npt.ArrayLike) -> float:
    counted = np.asarray(counts, float).ravel()
    return float(((counted - counted.mean()) ** 2 / counted.mean()).sum())


def test_all_orders_of_four_are_equally_likely() -> None:
    orders = Counter(tuple(Permutation(4, keys(key)).apply(np.arange(4)).tolist()) for key in range(4_800))
    assert len(orders) == 24
    assert chi_square(list(orders.values())) < 49.7  # 23 degrees of freedom: exceeded once in 1,000


@pytest.mark.parametrize("length", [1000, 1 << 20])
def test_places_are_uniform_and_neighbours_are_independent(length: int) -> None:
    """Count where the first windows of an epoch and their followers lie, in a grid of 10 x 10 regions."""
    grid = np.zeros((10, 10))
    for key in range(40):
        elements = Permutation(length, keys(key)).apply(np.arange(500)) * 10 // length
        np.add.at(grid, (elements[:-1], elements[1:]), 1)
    assert chi_square(grid) < 148.2  # 99 degrees of freedom: exceeded once in 1,000


def test_orders_are_as_recorded() -> None:
    """A change of the order would break the resume of every run that shuffles: give the new order another name."""
    assert Permutation(10, keys(0)).apply(np.arange(10)).tolist() == [1, 4, 9, 5, 3, 0, 8, 6, 2, 7]
    indices = np.array([0, 1, 2, 500_000, 1_000_002])
    assert Permutation(1_000_003, keys(1)).apply(indices).tolist() == [
        705084,
        988301,
        435395,
        425854,
        232942,
    ]
    indices = np.array([0, 1, (1 << 40) - 1])
    assert Permutation(1 << 40, keys(2)).apply(indices).tolist() == [
        804220678680,
        220434273719,
        988639331708,
    ]
