"""Model folders that are either whole or absent.

A folder is built under a temporary name beside its place and renamed when it is complete; its
manifest, written last, lists every file with size and SHA-256 and the recipe it was made by. One
lock for each parent folder keeps two builders apart, and whoever holds it may remove what a
killed builder left behind.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from picospec.home import home
from picospec_cli.console import say

MANIFEST = "picospec-manifest.json"
Recipe = Mapping[str, str | int]

_TEMPORARY = ".building-"


def model_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Where prepared models live."""
    return home(environ) / "models"


def is_complete(folder: Path, recipe: Recipe | None = None) -> bool:
    """Whether `folder` has every file of its manifest at its size, made by `recipe`. Fast."""
    manifest = _read_manifest(folder)
    if manifest is None or (recipe is not None and manifest["recipe"] != dict(recipe)):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["size"]
        for name, entry in manifest["files"].items()
    )


def damage(folder: Path) -> list[str]:
    """What is wrong with a prepared folder, file by file; reads and hashes everything."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return ["absent" if not folder.is_dir() else f"no readable {MANIFEST}"]
    found = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256(path) != entry["sha256"]:
            found.append(f"{name} has another SHA-256 than when it was made")
    return found


def build(folder: Path, recipe: Recipe, make: Callable[[Path], None]) -> bool:
    """Have `make` fill a fresh folder, then put it in place; False if nothing was to do.

    `make` may raise; then `folder` is as it was before. Waits for another builder.
    """
    if is_complete(folder, recipe):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        if is_complete(folder, recipe):  # made while we waited
            return False
        _remove_leftovers(folder.parent)
        workplace = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder.parent))
        try:
            fresh = workplace / "new"
            fresh.mkdir()
            make(fresh)
            _write_manifest(fresh, recipe)
            if folder.exists():
                folder.rename(workplace / "old")
            fresh.rename(folder)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_mb(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1_000_000


@contextmanager
def _locked(parent: Path) -> Iterator[None]:
    with (parent / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another picospec prepare is at work in {parent}; waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(parent: Path) -> None:
    for path in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path, recipe: Recipe) -> None:
    # Data reaches the disk before the manifest that vouches for it.
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name in files:
        (folder / name).chmod(0o644)  # the daemons may run as another user
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"recipe": dict(recipe), "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict | None:  # type: ignore[type-arg]
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and {"recipe", "files"} <= manifest.keys():
            return manifest
    return None
