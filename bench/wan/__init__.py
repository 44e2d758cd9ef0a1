"""A wide area network in one process: a TCP relay with delay, jitter, bandwidth and outages."""

from bench.wan.link import Link
from bench.wan.relay import WanRelay

__all__ = ["Link", "WanRelay"]
