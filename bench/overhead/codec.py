"""What it takes to put a law on the wire and to take it off: packed arrays against lists.

The cloud's side starts from a torch tensor, the edge's ends at numpy arrays. The comparison sends
the same numbers as repeated fields, through Python lists on both sides.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cloud_server.engine.judging.torch_sampling import TargetDistribution
from picospec.protocol import codec
from picospec.protocol.messages import Rejection, Verdict
from picospec.v1 import speculation_pb2 as pb

LOGITS_WIDTH = 49152
SIZES = (10, 64, 0)  # pairs of a rejection; 0: the whole law


def measure_codec(repeats: int) -> dict[str, dict[str, float]]:
    """Median microseconds and payload bytes for each of SIZES."""
    rows = {}
    probs = torch.softmax(torch.randn(LOGITS_WIDTH, generator=torch.Generator().manual_seed(1)), 0)
    target = TargetDistribution(None, probs)
    for size in SIZES:
        rejection = target.rejection(size, False, 0, 0, 0)
        packed = _pack(rejection)
        listed = _list(rejection)
        rows[f"K = {size or LOGITS_WIDTH}"] = {
            "bytes": len(packed),
            "encode_us": _median_us(partial(_pack, rejection), repeats),
            "decode_us": _median_us(partial(codec.cloud_from_bytes, packed), repeats),
            "list_bytes": len(listed),
            "list_encode_us": _median_us(partial(_list, rejection), repeats),
            "list_decode_us": _median_us(partial(_unlist, listed), repeats),
        }
    return rows


def _pack(rejection: Rejection) -> bytes:
    payload: bytes = codec.encode_cloud(Verdict(3, 300, rejection=rejection)).SerializeToString()
    return payload


def _list(rejection: Rejection) -> bytes:
    message = pb.SamplingParams(
        logit_bias_token_ids=rejection.token_ids.tolist(),
        logit_bias_values=rejection.probs.tolist(),
    )
    payload: bytes = message.SerializeToString()
    return payload


def _unlist(payload: bytes) -> tuple[list[int], list[float]]:
    message = pb.SamplingParams.FromString(payload)
    return list(message.logit_bias_token_ids), list(message.logit_bias_values)


def _median_us(call: Callable[[], Any], repeats: int) -> float:
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s) * 1e6
