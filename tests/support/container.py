"""Container images without a container engine: buildah builds, and namespaces run them.

Where neither docker nor podman can run, this does what they would do: a root that is really
read-only, the image's own user, environment and entry point, and process 1 of a namespace.
Needs root and buildah.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil

from tests.support.daemons import until
from tests.support.nspawn import make_root

BUILD_TIMEOUT_S = 600.0
BASE = "localhost/base"
# What a container engine does before it starts the command: $1 root, $2 models, $3 user.
ENTER = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$1/tmp"
mount -t tmpfs -o mode=755,uid=${3%%:*},gid=${3##*:} tmpfs "$1/cache"
mount --bind "$2" "$1/models"
mount -o remount,bind,ro "$1/models"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --rbind /sys "$1/sys"
user=$3 root=$1
shift 3
exec chroot "$root" setpriv --reuid="${user%%:*}" --regid="${user##*:}" --clear-groups \
    --no-new-privs --bounding-set=-all "$@"
"""


class Images:
    """A store of images of its own, to be removed with its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def buildah(self, *arguments: str | Path) -> str:
        """What it prints. Raises AssertionError with its complaint."""
        store = [f"--root={self._folder}/store", f"--runroot={self._folder}/run"]
        done = subprocess.run(
            ["buildah", *store, "--storage-driver=vfs", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
        )
        if done.returncode:
            said = done.stdout + done.stderr
            raise AssertionError(f"buildah {arguments[0]}: {said[-6000:]}")
        return done.stdout.strip()

    def make_base(self, packages: str) -> None:
        """An image from a fresh Debian root, since no registry may be in reach."""
        root = self._folder / "base"
        make_root(root, packages)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, root, "/")
        self.buildah("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(root)

    def build(self, containerfile: Path, context: Path, tag: str, **arguments: str) -> None:
        pip_conf = self._folder / "pip.conf"
        pip_conf.write_text(_pip_settings())
        flags = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        flags += [f"--volume={pip_conf}:/etc/pip.conf:ro"]
        flags += [f"--volume={path}:{path}:ro" for path in _pip_folders(pip_conf.read_text())]
        self.buildah(
            "bud", "--isolation=chroot", "--format=docker", f"--build-arg=BASE_IMAGE={BASE}",
            *flags, f"--file={containerfile}", f"--tag={tag}", context,
        )  # fmt: skip

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def config(self, tag: str) -> dict[str, Any]:
        """User, Env, Entrypoint, Healthcheck ... as docker names them."""
        inspected: dict[str, Any] = json.loads(self.buildah("inspect", "--type=image", tag))
        config: dict[str, Any] = inspected["Docker"]["config"]
        return config

    @contextmanager
    def running(
        self, tag: str, models: Path, environ: Mapping[str, str], log: Path
    ) -> Iterator[Container]:
        name = self.buildah("from", tag)
        root = self.buildah("mount", name)
        try:
            container = Container(self.config(tag), Path(root), models, environ, log)
            try:
                yield container
            finally:
                container.kill()
        finally:
            self.buildah("umount", name)
            self.buildah("rm", name)


class Container:
    """The image's entry point as process 1 of a namespace, with a read-only root."""

    def __init__(
        self,
        config: Mapping[str, Any],
        root: Path,
        models: Path,
        environ: Mapping[str, str],
        log: Path,
    ) -> None:
        self._config = config
        self._environ = dict(item.split("=", 1) for item in config["Env"]) | dict(environ)
        self.log = log
        self._process = subprocess.Popen(
            [
                "unshare", "--mount", "--pid", "--fork", "--kill-child",
                "sh", "-c", ENTER, "sh", root, models, config["User"], *config["Entrypoint"],
            ],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.pid = int(until(self._first_process))

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`command` in the container, as its user and with its environment."""
        user, group = self._config["User"].split(":")
        return subprocess.run(
            [
                "nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wd",
                f"--setuid={user}", f"--setgid={group}", *command,
            ],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip

    def wait(self, timeout_s: float) -> int:
        """The exit status."""
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        if self.running:
            psutil.Process(self.pid).kill()
        self._process.wait(30)

    def _first_process(self) -> int:
        children = psutil.Process(self._process.pid).children()
        return children[0].pid if children else 0


def _pip_settings() -> str:
    """pip's settings on this host as one file: a build inside a container has no others."""
    listed = subprocess.run(
        ["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        if key.startswith((":env:.", "global.")):
            settings[key.split(".", 1)[1]] = value.strip("'\"").replace("\\n", "\n    ")
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


def _pip_folders(settings: str) -> list[str]:
    """Folders and files of this host that those settings name."""
    words = settings.replace("=", " ").split()
    # An index refers to files beside itself.
    paths = {
        str(Path(urlparse(word).path).parent) if word.startswith("file:") else word
        for word in words
    }
    return sorted(path for path in paths if path.startswith("/") and os.path.exists(path))
