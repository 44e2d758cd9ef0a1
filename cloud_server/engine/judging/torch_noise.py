"""picospec/sampling/noise.py on a torch device: the same bits, by the same operations.

On the CPU a tensor's memory is numpy's too, so `race` hands it to numpy's version. On any other
device the noise is computed in place here, without moving the distribution. torch has little
arithmetic for unsigned words: words are int32, whose wrapping sums and products are the same
bits, and shifts are masked to be logical. Eager kernels run one operation each, so nothing is
fused, and no tensor is divided by a number (CUDA would multiply by its reciprocal).
"""

from functools import lru_cache

import torch

from picospec.sampling import noise
from picospec.sampling.noise import HASH_MULTIPLIERS, HASH_SHIFTS, LN2, LOG_COEFFICIENTS, Purpose


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word >> 31 else word


def _logical_shift(x: torch.Tensor, shift: int) -> torch.Tensor:
    return (x >> shift) & ((1 << (32 - shift)) - 1)


@lru_cache(maxsize=8)
def premixed_table(width: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(noise.premixed_table(width).astype("int32")).to(device)


def premix(token_ids: torch.Tensor) -> torch.Tensor:
    """`noise.premix`: integer ids [n] -> int32 words [n]."""
    x = token_ids.to(torch.int32) + _signed(0x9E3779B9)
    for shift, multiplier in noise.PREMIX_ROUNDS:
        x ^= _logical_shift(x, shift)
        x *= _signed(multiplier)
    x ^= _logical_shift(x, 15)
    return x


def token_hash(premixed: torch.Tensor, key: int) -> torch.Tensor:
    """`noise.token_hash`: int32 words [n] -> int32 words [n]."""
    x = premixed ^ _signed(key & 0xFFFFFFFF)
    x *= _signed(HASH_MULTIPLIERS[0])
    x ^= _logical_shift(x, HASH_SHIFTS[0])
    x += _signed(key >> 32)
    x *= _signed(HASH_MULTIPLIERS[1])
    x ^= _logical_shift(x, HASH_SHIFTS[1])
    x *= _signed(HASH_MULTIPLIERS[2])
    return x


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """`noise.exponential`: int32 words [n] -> float32 [n]."""
    lower = bits >= 0  # as unsigned: below 2^31
    u = _centred(bits) * 2.0**-32
    rest = _centred(~bits).view(torch.int32)
    m = ((rest & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    e = (158 - (rest >> 23)).to(torch.float32)
    z = torch.where(lower, u, 1.0 - m) / torch.where(lower, 2.0 - u, 1.0 + m)
    zz = z * z
    series = zz * LOG_COEFFICIENTS[-1]
    for coefficient in LOG_COEFFICIENTS[-2:0:-1]:
        series += coefficient
        series *= zz
    series += LOG_COEFFICIENTS[0]
    series *= z
    series += torch.where(lower, 0.0, e * LN2)
    return torch.maximum(series, u)


def _centred(bits: torch.Tensor) -> torch.Tensor:
    """The unsigned word + 0.5; 2^16 * high is exact, so the sum rounds once, like numpy's."""
    high = _logical_shift(bits, 16).to(torch.float32) * 65536.0
    return (high + (bits & 0xFFFF).to(torch.float32)) + 0.5


def race(
    probs: torch.Tensor,
    token_ids: torch.Tensor | None,
    seed: int,
    position: int,
    purpose: Purpose,
    attempt: int = 0,
) -> int:
    """`noise.race` for float32 probs [n] and integer ids [n] on any device."""
    if probs.device.type == "cpu":
        ids = None if token_ids is None else token_ids.numpy()
        return noise.race(probs.numpy(), ids, seed, position, purpose, attempt)
    return full_race(probs, token_ids, noise.noise_key(seed, position, purpose, attempt))


def full_race(probs: torch.Tensor, token_ids: torch.Tensor | None, key: int) -> int:
    """The race with every token's noise evaluated; one copy to the host, of the winner."""
    table = premixed_table(len(probs), probs.device) if token_ids is None else premix(token_ids)
    scores = probs / exponential(token_hash(table, key))
    return int(scores.argmax())
