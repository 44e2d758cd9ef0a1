"""What deployment tests share: a package, a cloud server outside, and a machine with systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from picospec_cli import prepare
from picospec_cli.model_folder import model_home
from tests.support.container import Images
from tests.support.daemons import Cloud, Daemons
from tests.support.nspawn import Machine, make_root, missing_tools

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600
CONTAINER_TAG = "localhost/picospec-cloud"
BASE_PACKAGES = "python3,python3-venv,python3-dev,ca-certificates,libnuma1"
SITE_PACKAGES = Path(pytest.__file__).parents[1]  # of the environment that runs the tests


_POOL = ThreadPoolExecutor()
_IMAGE = pytest.StashKey[Future[Images]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The image takes minutes to build, mostly of waiting: begin at once, beside other tests."""
    wanted = any("images" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.stash[_IMAGE] = _POOL.submit(build_image)


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> Iterator[Images]:
    """A store with the cloud server's image, CONTAINER_TAG."""
    images = request.config.stash[_IMAGE].result()
    yield images
    images.remove()


def build_image() -> Images:
    if shutil.which("buildah") is None or os.geteuid() != 0:
        raise RuntimeError("container tests need root and buildah: see CONTRIBUTING.md")
    images = Images(Path(tempfile.mkdtemp(prefix="picospec-images-")))
    images.make_base(BASE_PACKAGES)
    images.build(ROOT / "deploy/container/Containerfile", ROOT, CONTAINER_TAG, VARIANT="cpu")
    return images


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@dataclass(frozen=True, slots=True)
class Site:
    """All that a deployment starts from."""

    package: Path  # the .deb
    machine: Machine
    models: Path


@pytest.fixture(scope="session")
def models() -> Path:
    prepare.prepare_pair(names=["draft-int4"])  # at once if they are there
    return model_home()


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with Daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons


@pytest.fixture(scope="session")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A package just built, and a booted machine to install it in."""
    if missing := missing_tools():
        pytest.fail(f"deployment tests need {', '.join(missing)}: see CONTRIBUTING.md")
    folder = tmp_path_factory.mktemp("site")
    with ThreadPoolExecutor() as pool:  # about 20 s each
        making = pool.submit(make_root, folder / "root")
        package = pool.submit(build_package, folder / "packages").result()
        making.result()
    shutil.copytree(models / "draft-int4", folder / "root/srv/models/draft-int4")
    binds = {SITE_PACKAGES: "/opt/site-packages", models / "target": "/srv/models/target"}
    with Machine(folder / "root", binds) as machine:
        yield Site(package, machine, models)
    shutil.rmtree(folder, ignore_errors=True)


def build_package(out: Path) -> Path:
    built = subprocess.run(
        [ROOT / "deploy/debian/build", out], check=True, capture_output=True, text=True
    )
    return Path(built.stdout.strip())


@pytest.fixture(scope="session")
def outside_cloud(daemons: Daemons, models: Path) -> Cloud:
    """A cloud server on the host."""
    return daemons.start_cloud("outside", models / "target")
