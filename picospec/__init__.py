"""PicoSpec's shared core: what the edge agent and the cloud server must agree on.

No I/O, no clock, no torch and no vLLM here; see docs/architecture.md for the map.
"""

PROTOCOL_VERSION = 1

__version__ = "0.1.0"
