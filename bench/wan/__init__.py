"""A wide area network in one process: a TCP relay with delay, jitter, bandwidth and outages."""

from bench.wan.line import LineConditions
from bench.wan.relay import WanRelay

__all__ = ["LineConditions", "WanRelay"]
