"""Environments of backends: what a lock asks, where it lies, and making it on demand with venv and pip."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qbuild import machine
from qbuild.budget import format_size
from qbuild.digest import digest_bytes
from qbuild.errors import ActionFailed, ConfigError, InputError
from qbuild.fsutil import FileLock, disk_free

__all__ = ["BACKENDS", "Environment", "Package", "create", "environment", "variables"]

BACKENDS = ("autoawq", "auto_gptq", "gptqmodel")
LOCKS = Path(__file__).parent / "locks"
# Variables of a library's installation and of its runs. GPTQModel 7.7 compiles what it needs when it is needed; where
# there are two cores or fewer, it asks for more workers than it made, and fails.
VARIABLES = {"gptqmodel": {"GPTQMODEL_BUILD": "0", "GPTQMODEL_CPU_WORKERS": "2"}}
UNPACKED = 2.2  # bytes on disk for a byte of download, at most
LINE = re.compile(
    r"(?P<name>[\w.-]+)==(?P<version>[\w.+!-]+) --hash=sha256:[0-9a-f]{64}  # (?P<nbytes>\d+) (?P<kind>wheel|source)"
)


@dataclass(frozen=True)
class Package:
    """``nbytes`` are what is downloaded; a package that is no wheel is built where it is installed."""

    name: str
    version: str
    nbytes: int
    wheel: bool
    requirement: str


@dataclass(frozen=True)
class Environment:
    """What a lock describes, at its place below the cache. ``digest`` belongs into the key of what it makes."""

    backend: str
    python: str
    packages: tuple[Package, ...]
    digest: str
    path: Path

    @property
    def interpreter(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def ready(self) -> bool:
        return self._marker.is_file()

    @property
    def version(self) -> str:
        """Of the library."""
        name = self.backend.replace("_", "-")
        return next(p.version for p in self.packages if p.name.lower().replace("_", "-") == name)

    @property
    def download(self) -> int:
        """Bytes that making it downloads."""
        return sum(package.nbytes for package in self.packages)

    @property
    def disk(self) -> int:
        """Bytes that making it takes: what is unpacked, and what pip keeps of the download."""
        return int(self.download * (1 + UNPACKED))

    @property
    def _marker(self) -> Path:
        return self.path / "qbuild-ready"

    def announcement(self) -> str:
        """What making it will do, for the user to read before it is done."""
        largest = sorted(self.packages, key=lambda package: -package.nbytes)[:3]
        libraries = ", ".join(f"{package.name} {package.version}" for package in largest)
        return (
            f"{self.backend} {self.version} runs in an environment of its own: {len(self.packages)} packages "
            f"({libraries}, …), {format_size(self.download)} to download, {format_size(self.disk)} of disk at most, "
            f"into {self.path}"
        )


def environment(backend: str, root: Path) -> Environment:
    """The environment of a backend below ``root``. ConfigError for a name that is none."""
    if backend not in BACKENDS:
        raise ConfigError("backend", f"{backend!r} is no backend", f"backends: native, {', '.join(BACKENDS)}")
    return parse(backend, (LOCKS / f"{backend}.txt").read_text(), root)


def parse(backend: str, lock: str, root: Path) -> Environment:
    """A lock: ``# python 3.11``, then ``name==version --hash=sha256:…  # bytes wheel|source`` for each package."""
    head, *lines = lock.splitlines()
    packages = []
    for line in lines:
        match = LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{backend}.txt", f"is no lock: {line[:80]!r}", "install qbuild again")
        requirement = line.partition("  #")[0]
        packages.append(
            Package(match["name"], match["version"], int(match["nbytes"]), match["kind"] == "wheel", requirement)
        )
    digest = digest_bytes(lock.encode()).hash
    return Environment(
        backend, head.removeprefix("# python "), tuple(packages), digest, root / f"{backend}-{digest[:12]}"
    )


def create(wanted: Environment, pip: Sequence[str] = ()) -> None:
    """Make an environment that is not ready; another process that makes it is waited for.

    ``pip`` are further options for pip, ``--no-index --find-links=DIR`` on a machine without a network. ActionFailed
    with pip's last words where it fails; what was half made is removed.
    """
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(wanted.path.with_suffix(".lock"))
    lock.acquire()
    try:
        if wanted.ready:
            return
        _enough_disk(wanted)
        shutil.rmtree(wanted.path, ignore_errors=True)
        try:
            _install(wanted, pip)
        except BaseException:
            shutil.rmtree(wanted.path, ignore_errors=True)
            raise
        wanted._marker.touch()
    finally:
        lock.release()


def variables(backend: str) -> dict[str, str]:
    """The environment variables of a backend's processes; packages of other environments are not theirs."""
    kept = {name: value for name, value in machine.environ().items() if not name.startswith("PYTHON")}
    return {**kept, "HF_HUB_OFFLINE": "1", **VARIABLES.get(backend, {})}


def _install(wanted: Environment, pip: Sequence[str]) -> None:
    """Wheels first: what is built from source is built by them, as torch must be there to build an extension of it."""
    _run(wanted, [_python(wanted.python), "-m", "venv", str(wanted.path)])
    base = [str(wanted.interpreter), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", *pip]
    for wheel, options in ((True, ["--only-binary", ":all:"]), (False, ["--no-build-isolation"])):
        chosen = [package.requirement for package in wanted.packages if package.wheel == wheel]
        if chosen:
            listed = wanted.path / ("wheels.txt" if wheel else "sources.txt")
            listed.write_text("\n".join(chosen) + "\n")
            _run(wanted, [*base, *options, "--require-hashes", "-r", str(listed)])


def _run(wanted: Environment, command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables(wanted.backend))
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = [line for line in said if "rror" in line] or said
        remedy = "check the network, or name a folder of packages: backend.pip='--no-index --find-links=DIR'"
        raise ActionFailed(f"backend {wanted.backend}", "\n  ".join(["cannot be installed:", *said[-4:]]), remedy)


def _python(version: str) -> str:
    """A Python of the version that a lock was made for: this one, or one on the path."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        raise InputError(f"python{version}", "is not on the path, and the lock was made for it", "install it beside")
    return found


def _enough_disk(wanted: Environment) -> None:
    free = disk_free(wanted.path.parent)
    if free < wanted.disk:
        fact = f"needs {format_size(wanted.disk)} of disk, {format_size(free)} are free"
        raise ActionFailed(
            f"backend {wanted.backend}", fact, f"free some, or backend.dir=/BIG/DISK: it lies in {wanted.path}"
        )
