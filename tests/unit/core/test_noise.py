"""The noise is pinned bit by bit, follows its law, and is independent wherever it must be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from picospec.sampling.noise import (
    Purpose,
    exponential,
    noise_key,
    premix,
    premixed_table,
    race,
    token_hash,
    uniform,
)

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("noise_vectors.json").read_text()
)
EDGE_BITS = np.unique(
    np.concatenate(
        [
            np.arange(4096),
            2**31 + np.arange(-4096, 4096),
            2**32 - 1 - np.arange(4096),
            2 ** np.arange(32),
            np.random.default_rng(0).integers(0, 2**32, 100_000),
        ]
    )
).astype(np.uint32)


def draw_of(vector: dict[str, Any]) -> tuple[int, int, Purpose, int]:
    return (
        int(vector["seed"]),
        vector["position"],
        Purpose(vector["purpose"]),
        vector["attempt"],
    )


def hashes(width: int, num_keys: int, purpose: Purpose = Purpose.DRAFT) -> np.ndarray:
    """[num_keys, width] hash words, one row for each of `num_keys` neighbouring positions."""
    table = premixed_table(width)
    return np.stack([token_hash(table, noise_key(7, i, purpose)) for i in range(num_keys)])


@pytest.mark.parametrize("vector", VECTORS["hash"])
def test_hash_equals_the_vectors(vector: dict[str, Any]) -> None:
    key = noise_key(*draw_of(vector))
    assert f"{key:016x}" == vector["key"]
    bits = token_hash(premix(np.array(vector["token_ids"])), key)
    assert [f"{int(word):08x}" for word in bits] == vector["bits"]


def test_exponential_equals_the_vectors() -> None:
    bits = np.array([int(v["bits"], 16) for v in VECTORS["exponential"]], np.uint32)
    expected = [int(v["float32"], 16) for v in VECTORS["exponential"]]
    assert exponential(bits).view(np.uint32).tolist() == expected


@pytest.mark.parametrize("vector", VECTORS["uniform"])
def test_uniform_equals_the_vectors(vector: dict[str, Any]) -> None:
    assert uniform(*draw_of(vector)) == float.fromhex(vector["value"])


@pytest.mark.parametrize("vector", VECTORS["race"])
@pytest.mark.parametrize("width", [2, 32, 49_152])
def test_race_equals_the_vectors(vector: dict[str, Any], width: int) -> None:
    probs = np.float32(1.0) / np.arange(1, width + 1, dtype=np.float32)
    assert race(probs, None, *draw_of(vector)) == vector[f"harmonic_{width}"]


def test_exponential_is_accurate_and_above_its_bound() -> None:
    u = (EDGE_BITS.astype(np.float64) + 0.5) * 2.0**-32
    noise = exponential(EDGE_BITS)
    assert np.abs(noise / -np.log1p(-u) - 1.0).max() < 5e-7
    u32 = (EDGE_BITS.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    assert (noise >= u32).all()


def test_exponential_follows_its_law() -> None:
    noise = exponential(hashes(4096, 64).ravel())
    assert stats.kstest(noise, "expon").pvalue > 1e-3
    # Small noise wins races, so its law is looked at on its own scale, too.
    small = noise[noise < 2.0**-8]
    counts = np.histogram(small, bins=np.linspace(0, 2.0**-8, 17))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_every_bit_of_the_hash_is_fair() -> None:
    words = hashes(2048, 128).ravel()
    ones = [np.count_nonzero(words >> np.uint32(bit) & np.uint32(1)) for bit in range(32)]
    sigma = math.sqrt(words.size / 4)
    assert max(abs(count - words.size / 2) for count in ones) < 4.5 * sigma


def test_uniform_follows_its_law_and_excludes_its_ends() -> None:
    values = [uniform(s, p, Purpose.ACCEPT) for s in range(100) for p in range(100)]
    assert min(values) > 0.0
    assert max(values) < 1.0
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    flips = [uniform(5, 9, Purpose.COIN, attempt) for attempt in range(10_000)]
    assert stats.kstest(flips, "uniform").pvalue > 1e-3


PAIRS = {
    "adjacent positions": ((3, 10, Purpose.DRAFT, 0), (3, 11, Purpose.DRAFT, 0)),
    "adjacent seeds": ((3, 10, Purpose.DRAFT, 0), (4, 10, Purpose.DRAFT, 0)),
    "purposes": ((3, 10, Purpose.DRAFT, 0), (3, 10, Purpose.FIRST, 0)),
    "attempts": ((3, 10, Purpose.TAIL, 0), (3, 10, Purpose.TAIL, 1)),
    "seed and position exchanged": ((3, 10, Purpose.DRAFT, 0), (10, 3, Purpose.DRAFT, 0)),
}


def assert_independent(left: np.ndarray, right: np.ndarray) -> None:
    """Two samples of words, pairwise: no correlation, and an 8 x 8 table without structure."""
    u = left.ravel() / 2.0**32
    v = right.ravel() / 2.0**32
    assert abs(np.corrcoef(u, v)[0, 1]) * math.sqrt(u.size) < 4.5
    table = np.histogram2d(u, v, bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-4
    # Where the race is decided: both words small at once.
    both = np.count_nonzero((u < 1 / 32) & (v < 1 / 32))
    assert stats.binomtest(both, u.size, 1 / 1024).pvalue > 1e-4


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_draws_are_independent_of_each_other(pair: tuple[Any, Any]) -> None:
    table = premixed_table(49_152)
    left, right = (token_hash(table, noise_key(*draw)) for draw in pair)
    assert_independent(left, right)


@pytest.mark.parametrize("distance", [1, 2, 16, 256, 1024])
def test_token_ids_are_independent_of_each_other(distance: int) -> None:
    words = hashes(2048, 40)
    assert_independent(words[:, :-distance], words[:, distance:])


def test_one_pair_of_ids_is_independent_over_many_positions() -> None:
    table = premix(np.array([11, 12, 40_000]))
    words = np.stack([token_hash(table, noise_key(1, p, Purpose.COUPLED)) for p in range(20_000)])
    assert_independent(words[:, 0], words[:, 1])
    assert_independent(words[:, 0], words[:, 2])
    assert_independent(words[:-1, 0], words[1:, 0])


def test_uniform_and_race_of_one_draw_are_independent() -> None:
    table = premix(np.array([0]))
    keys = [(2, p, Purpose.DRAFT) for p in range(20_000)]
    words = np.array([token_hash(table, noise_key(*key))[0] for key in keys])
    assert_independent(words, np.array([uniform(*key) for key in keys]) * 2.0**32)


def test_race_draws_from_the_probabilities() -> None:
    probs = np.array([0.5, 0.25, 0.2, 0.03, 0.015, 0.005], np.float32)
    token_ids = np.array([0, 1, 500, 2, 49_151, 77], np.int32)
    winners = [race(probs, token_ids, s, 3, Purpose.DRAFT) for s in range(40_000)]
    counts = np.bincount(winners, minlength=len(probs))
    law = probs.astype(np.float64) / probs.sum(dtype=np.float64)
    assert stats.chisquare(counts, law * len(winners)).pvalue > 1e-3


def test_race_draws_rare_tokens_of_a_large_vocabulary() -> None:
    probs = np.full(20_000, 0.5 / 19_999, np.float32)
    probs[123] = 0.5
    winners = np.array([race(probs, None, 9, p, Purpose.FIRST) for p in range(4_000)])
    assert stats.binomtest(int(np.count_nonzero(winners == 123)), 4_000, 0.5).pvalue > 1e-3
    others = winners[winners != 123] / 20_000
    assert stats.kstest(others, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("width", [1, 2, 50, 49_152])
def test_race_equals_the_full_evaluation(scale: float, width: int) -> None:
    rng = np.random.default_rng(int(scale) + width)
    for position in range(60):
        weights = np.exp(scale * rng.normal(size=width))
        probs = (weights / weights.sum()).astype(np.float32)
        key = noise_key(4, position, Purpose.COUPLED, 0)
        full = int((probs / exponential(token_hash(premixed_table(width), key))).argmax())
        assert race(probs, None, 4, position, Purpose.COUPLED) == full


def test_race_depends_on_ids_and_probabilities_alone() -> None:
    rng = np.random.default_rng(1)
    dense = np.zeros(1000, np.float32)
    ids = np.sort(rng.choice(1000, 40, replace=False)).astype(np.int32)
    dense[ids] = rng.dirichlet(np.ones(40))
    shuffled = rng.permutation(ids)
    for position in range(200):
        draw = (8, position, Purpose.COUPLED)
        winner = race(dense, None, *draw)
        assert ids[race(dense[ids], ids, *draw)] == winner
        assert shuffled[race(dense[shuffled], shuffled, *draw)] == winner


@pytest.mark.parametrize("probs", [[0.0, 0.0], [math.nan, 1.0], [0.5, math.nan]])
def test_race_refuses_what_is_no_law(probs: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        race(np.array(probs, np.float32), None, 0, 0, Purpose.DRAFT)
