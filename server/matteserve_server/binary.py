"""Finding a real `tritonserver`, and installing the one that the package registry has.

Looked for in this order:

1. the path given (`--tritonserver`),
2. `tritonserver` on PATH, as in NVIDIA's container, with the native backends beside it,
3. the binary of the wheel `nvidia-pytriton`, put there by `matteserve install-triton` (or by installing that wheel).

The wheel is not a dependency, because its metadata pins numpy < 2 and brings dozens of packages for its own Python
interface; only its binaries are wanted. pip installs it alone, from a pinned version with pinned hashes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from matteserve_server._errors import InstallError, TritonNotFoundError

# 0.7.0 is the last release; it contains tritonserver 2.51.0 and stubs for Python 3.8 to 3.13.
WHEEL = "nvidia-pytriton"
WHEEL_VERSION = "0.7.0"
WHEEL_SHA256 = (
    "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",  # x86_64
    "f99e07ee56fe065337453956afba17d2673e02ec6a632c3de26ce6e7b32a0898",  # aarch64
)
WHEEL_MEGABYTES = 55
MINIMUM_GLIBC = (2, 35)

_INSTALL_HINT = "run `matteserve install-triton` (55 MB from your package index), or use NVIDIA's container"


@dataclass(frozen=True)
class TritonBinary:
    """A `tritonserver` that can be started.

    Attributes:
        executable: The program.
        wheel_root: Directory with `pytriton/` and `nvidia_pytriton.libs/` if the program comes from the wheel; None
            for NVIDIA's container, which brings its own backends and libraries.
        source: Where it was found, for people.
    """

    executable: Path
    wheel_root: Path | None
    source: str

    def environment(self) -> dict[str, str]:
        """The process environment in which this program runs."""
        environment = dict(os.environ)
        if self.wheel_root is None:
            return environment
        # The stub is linked to the interpreter's libpython; with a static interpreter the directory does no harm.
        libraries = [str(self.wheel_root / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR") or "")]
        environment["LD_LIBRARY_PATH"] = _join_path(*libraries, environment.get("LD_LIBRARY_PATH", ""))
        # The stub runs the first `python3` on PATH and ignores VIRTUAL_ENV and PYTHONHOME.
        environment["PATH"] = _join_path(str(Path(sys.executable).parent), environment.get("PATH", ""))
        return environment

    def stub(self) -> Path:
        """The Python backend's stub for this interpreter (wheel only).

        Raises:
            TritonNotFoundError: The wheel has no stub for this Python version.
        """
        assert self.wheel_root is not None, "only the wheel's binary needs a stub from us"
        stubs = self.wheel_root / "pytriton" / "tritonserver" / "python_backend_stubs"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = stubs / version / "triton_python_backend_stub"
        if not stub.is_file():
            found = sorted((p.name for p in stubs.glob("3.*")), key=lambda name: int(name.split(".")[1]))
            raise TritonNotFoundError(
                f"the tritonserver at {self.executable} has no Python stub for Python {version}, only for "
                f"{', '.join(found) or 'none'}; use one of these Python versions, or NVIDIA's container"
            )
        return stub


def install_directory() -> Path:
    """Where `matteserve install-triton` puts the binary: inside a virtual environment, else in the user's cache."""
    if override := os.environ.get("MATTESERVE_TRITON_HOME"):
        return Path(override)
    inside = Path(sys.prefix) / "share" / "matteserve"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return inside / f"triton-{WHEEL_VERSION}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "matteserve" / f"triton-{WHEEL_VERSION}"


def find_tritonserver(path: Path | None = None) -> TritonBinary:
    """Find the program to run.

    Args:
        path: An explicit `tritonserver`; nothing else is tried then.

    Raises:
        TritonNotFoundError: There is none, or it cannot run here.
    """
    if path is not None:
        if not path.is_file() or not os.access(path, os.X_OK):
            raise TritonNotFoundError(f"{path} is not an executable file; give the path of `tritonserver` itself")
        return TritonBinary(path.absolute(), _wheel_root_of(path.absolute()), "given")
    if on_path := shutil.which("tritonserver"):
        return TritonBinary(Path(on_path), _wheel_root_of(Path(on_path)), "PATH")
    for root in (install_directory(), _site_packages_root()):
        if root is not None and (executable := _executable_in(root)).is_file():
            _check_glibc()
            return TritonBinary(executable, root, f"wheel {WHEEL}")
    raise TritonNotFoundError(f"no tritonserver on PATH and none from the wheel {WHEEL}; {_INSTALL_HINT}")


def install_triton(*, reinstall: bool = False) -> Path:
    """Install the binaries of the wheel `nvidia-pytriton`, and nothing that it depends on.

    Returns:
        The directory that now contains them.

    Raises:
        InstallError: No pip, no network, wrong hash, or no room.
    """
    target = install_directory()
    if _executable_in(target).is_file() and not reinstall:
        return target
    _check_glibc()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".triton-") as scratch:
        staged = Path(scratch) / "wheel"
        requirements = Path(scratch) / "requirements.txt"
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in WHEEL_SHA256)
        requirements.write_text(f"{WHEEL}=={WHEEL_VERSION} {hashes}\n")
        command = [
            *_installer(), "install", "--no-deps", "--require-hashes", "--only-binary", ":all:",
            "--target", str(staged), "--requirement", str(requirements),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not _executable_in(staged).is_file():
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
            raise InstallError(
                f"could not install {WHEEL}=={WHEEL_VERSION} into {target}: {reason}. "
                "Is a package index reachable, and is there 200 MB of room?"
            )
        for entry in staged.iterdir():
            if entry.name not in {"pytriton", "nvidia_pytriton.libs"}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if target.exists():
            shutil.rmtree(target)
        staged.replace(target)  # a half-copied binary is never found
    return target


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if uv := shutil.which("uv"):
        return [uv, "pip"]
    raise InstallError("neither pip nor uv is in this environment; install one, e.g. `python -m ensurepip`")


def _executable_in(root: Path) -> Path:
    return root / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def _wheel_root_of(executable: Path) -> Path | None:
    """The wheel's root if `executable` lies in one, else None."""
    parents = executable.resolve().parents
    root = parents[3] if len(parents) > 3 else None
    return root if root is not None and (root / "nvidia_pytriton.libs").is_dir() else None


def _site_packages_root() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent.parent if spec is not None and spec.origin else None


def _check_glibc() -> None:
    name, _, version = (
        (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ") if sys.platform == "linux" else ("", "", "")
    )
    found = tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else (0, 0)
    if found < MINIMUM_GLIBC:
        raise TritonNotFoundError(
            f"the wheel's tritonserver needs Linux with glibc {'.'.join(map(str, MINIMUM_GLIBC))} or newer, "
            f"found {f'{name} {version}' if name else sys.platform}; use NVIDIA's container instead"
        )


def _join_path(*parts: str) -> str:
    return os.pathsep.join(part for part in parts if part)
