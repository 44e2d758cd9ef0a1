"""Every random choice of both daemons, as a function of (seed, position, purpose, attempt).

The rules of this file:
1. Noise is counter-based: there is no generator and no state. Whoever knows the seed can
   compute any position's noise, in any order, as often as needed.
2. What is drawn for different purposes, positions, attempts or token ids is independent.
3. A token is drawn by an exponential race: with E ~ Exp(1) for each token, argmax probs / E
   follows probs. (Gumbel noise g = -log E gives the same winner for argmax log probs + g.)
4. E is bit-identical wherever it is computed (numpy here, torch in the cloud on CPU or GPU):
   it is made of integer operations and of single, correctly rounded IEEE float32 operations
   in a fixed order. No library logarithm, no fused multiply-add, no division by a constant.
   tests/unit/noise_vectors.json pins it.
"""

import enum
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from picospec.protocol.messages import ProbArray, TokenArray

HashArray = NDArray[np.uint32]  # [num_tokens]


class Purpose(enum.IntEnum):
    """What a piece of noise decides. The values are part of the protocol."""

    COUPLED = 0  # coupled: the race both sides run
    DRAFT = 1  # split: the edge's draft
    ACCEPT = 2  # split: u of the acceptance test
    FIRST = 3  # split: the cloud's first token
    COIN = 4  # split: residual on S, or tail
    RESIDUAL = 5  # split: the recovered token from S
    TAIL = 6  # split: the cloud's tail sample
    TAIL_ACCEPT = 7  # split: whether the edge takes the tail sample


_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15

# The token hash and the exponential, as numbers; torch_noise uses the same.
HASH_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1)  # odd, half their bits set
HASH_SHIFTS = (16, 15)
PREMIX_ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97))  # shift, multiplier
# 2 / (2 i + 1): log((1 + z) / (1 - z)) = z * sum_i coefficient[i] * z^(2 i). With z <= 1/3
# eight terms leave a relative error of 1e-8, below float32's.
LOG_COEFFICIENTS = tuple(float(np.float32(2.0 / (2 * i + 1))) for i in range(8))
LN2 = float(np.float32(0.6931471805599453))

_FIRST, _SECOND, _THIRD = (np.uint32(multiplier) for multiplier in HASH_MULTIPLIERS)
_HIGH_SHIFT, _LOW_SHIFT = (np.uint32(shift) for shift in HASH_SHIFTS)
_HALF, _MANTISSA, _EXPONENT_OF_HALF, _EXPONENT_BIAS, _MANTISSA_BITS = (
    np.uint32(word) for word in (1 << 31, 0x007FFFFF, 0x3F000000, 126 + 32, 23)
)
_ZERO, _ONE, _TWO, _SCALE, _LN2 = (np.float32(number) for number in (0.0, 1.0, 2.0, 2.0**-32, LN2))
_CENTRE = np.float32(0.5)
_SERIES = tuple(np.float32(coefficient) for coefficient in LOG_COEFFICIENTS)


def _mix64(word: int) -> int:
    """A bijection on 64-bit words in which every input bit moves every output bit."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)


def noise_key(seed: int, position: int, purpose: Purpose, attempt: int = 0) -> int:
    """The 64-bit key of one draw. `seed` is 64 bits, `position` and `attempt` 32 bits each."""
    key = _mix64((seed + _GOLDEN64) & _MASK64)
    key = _mix64(((key ^ position) + _GOLDEN64) & _MASK64)
    return _mix64(((key ^ (purpose << 32 | attempt)) + _GOLDEN64) & _MASK64)


def uniform(seed: int, position: int, purpose: Purpose, attempt: int = 0) -> float:
    """One number from (0, 1), both ends excluded, with 52 random bits."""
    key = noise_key(seed, position, purpose, attempt)
    return ((_mix64(key ^ _GOLDEN64) >> 12) + 0.5) * 2.0**-52


def premix(token_ids: NDArray[np.integer]) -> HashArray:
    """Scatters ids over 32 bits, one to one, so that neighbours have nothing in common."""
    x = np.asarray(token_ids).astype(np.uint32)
    x += np.uint32(0x9E3779B9)
    for shift, multiplier in PREMIX_ROUNDS:
        x ^= x >> np.uint32(shift)
        x *= np.uint32(multiplier)
    x ^= x >> np.uint32(15)
    return x


@lru_cache(maxsize=8)
def premixed_table(width: int) -> HashArray:
    """`premix` of the ids 0 .. width - 1, computed once per vocabulary width. Read-only."""
    table = premix(np.arange(width, dtype=np.uint32))
    table.flags.writeable = False
    return table


def token_hash(premixed: HashArray, key: int) -> HashArray:
    """32 random bits for each token under `key` (see `noise_key`)."""
    x = premixed ^ np.uint32(key & 0xFFFFFFFF)
    x *= _FIRST
    shifted = x >> _HIGH_SHIFT
    x ^= shifted
    x += np.uint32(key >> 32)
    x *= _SECOND
    np.right_shift(x, _LOW_SHIFT, out=shifted)
    x ^= shifted
    x *= _THIRD  # no shift after it: the top bits, which decide, would not change
    return x


def exponential(bits: HashArray) -> ProbArray:
    """E = -log(1 - u) ~ Exp(1) for u = (bits + 0.5) / 2^32, exact to about 3e-7 relative.

    A small E wins the race, so small u keep full relative precision. The upper half works on
    1 - u = m * 2^-e with m in [0.5, 1), from the complement, which is exact too.
    E >= u holds for the rounded values as well; `race` leans on it.
    """
    lower = bits < _HALF
    u = _centred(bits) * _SCALE
    rest = _centred(~bits).view(np.uint32)  # (1 - u) * 2^32, as its bit pattern
    m = (rest & _MANTISSA | _EXPONENT_OF_HALF).view(np.float32)
    e = (_EXPONENT_BIAS - (rest >> _MANTISSA_BITS)).astype(np.float32)
    z = np.where(lower, u, _ONE - m) / np.where(lower, _TWO - u, _ONE + m)
    zz = z * z
    series = zz * _SERIES[-1]
    for coefficient in _SERIES[-2:0:-1]:
        series += coefficient
        series *= zz
    series += _SERIES[0]
    series *= z
    series += np.where(lower, _ZERO, e * _LN2)
    noise: ProbArray = np.maximum(series, u)
    return noise


def _centred(bits: HashArray) -> ProbArray:
    """bits + 0.5 in float32: two roundings, to nearest even."""
    centred = bits.astype(np.float32)
    centred += _CENTRE
    return centred


def race(
    probs: ProbArray,
    token_ids: TokenArray | None,
    seed: int,
    position: int,
    purpose: Purpose,
    attempt: int = 0,
) -> int:
    """Draws an index of `probs`, each with its probability: argmax probs / E, lowest on ties.

    `probs` is float32 [n], not negative, some positive, not necessarily normalised;
    `token_ids` is int32 [n], None for 0 .. n - 1. The winner depends on ids and probabilities
    alone, not on their order or on the tokens that have none. Raises ValueError without any
    positive probability, or with a NaN.

    E >= u, so probs / u bounds probs / E from above and costs no logarithm. Only tokens whose
    bound reaches the score of one good token need it, a handful; for that token a score that
    is a little too low does, so the library's logarithm is good enough there.
    """
    premixed = premixed_table(len(probs)) if token_ids is None else premix(token_ids)
    bits = token_hash(premixed, noise_key(seed, position, purpose, attempt))
    bound = _centred(bits)
    np.divide(probs, bound, out=bound)  # = (probs / u) * 2^-32, scaled without rounding
    best = int(bound.argmax())
    if not bound[best] > 0:
        raise ValueError("a race needs probabilities, some of them positive and none NaN")
    noise = -math.log1p(-(int(bits[best]) + 0.5) * 2.0**-32)
    score = float(probs[best]) / noise * 2.0**-32
    contenders = (bound >= np.float32(score * (1.0 - 1e-5))).nonzero()[0]
    if len(contenders) == 1:
        return best
    scores = probs[contenders] / exponential(bits[contenders])
    return int(contenders[scores.argmax()])
