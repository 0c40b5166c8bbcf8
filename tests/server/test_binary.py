"""Finding and installing tritonserver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from matteserve_server import InstallError, TritonBinary, TritonNotFoundError, binary, find_tritonserver, install_triton


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any tritonserver; the directory where one would be installed."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("MATTESERVE_TRITON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(binary, "_site_packages_root", lambda: None)
    return tmp_path / "home"


def make_executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_nothing_found_names_the_command_that_helps(no_triton: Path) -> None:
    with pytest.raises(TritonNotFoundError, match=r"no tritonserver on PATH.*run `matteserve install-triton`"):
        find_tritonserver()


def test_explicit_path_must_be_executable(tmp_path: Path) -> None:
    (tmp_path / "tritonserver").write_text("not a program")
    with pytest.raises(TritonNotFoundError, match="is not an executable file"):
        find_tritonserver(tmp_path / "tritonserver")


def test_explicit_path_is_taken_before_path(no_triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_executable(tmp_path / "given" / "tritonserver")
    monkeypatch.setenv("PATH", str(make_executable(tmp_path / "bin" / "tritonserver").parent))
    assert find_tritonserver(given) == TritonBinary(given, None, "given")


def test_path_is_taken_before_the_wheel(no_triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_executable(no_triton / "pytriton/tritonserver/bin/tritonserver")
    on_path = make_executable(tmp_path / "bin" / "tritonserver")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_tritonserver() == TritonBinary(on_path, None, "PATH")


def test_wheel_is_recognised_and_gets_its_libraries(no_triton: Path) -> None:
    make_executable(no_triton / "pytriton/tritonserver/bin/tritonserver")
    (no_triton / "nvidia_pytriton.libs").mkdir()
    found = find_tritonserver()
    assert found.wheel_root == no_triton
    environment = found.environment()
    assert environment["LD_LIBRARY_PATH"].startswith(str(no_triton / "nvidia_pytriton.libs"))
    # The stub takes the first python3 on PATH, whatever the virtual environment.
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_container_binary_keeps_its_environment(no_triton: Path, tmp_path: Path) -> None:
    given = make_executable(tmp_path / "opt" / "tritonserver")
    assert find_tritonserver(given).environment()["PATH"] == "/nowhere"


def test_wheel_without_a_stub_for_this_python_says_which_it_has(no_triton: Path) -> None:
    executable = make_executable(no_triton / "pytriton/tritonserver/bin/tritonserver")
    stubs = no_triton / "pytriton/tritonserver/python_backend_stubs"
    for version in ("3.9", "3.8"):
        (stubs / version).mkdir(parents=True)
    with pytest.raises(TritonNotFoundError, match=r"no Python stub for Python 3\.\d+, only for 3\.8, 3\.9"):
        TritonBinary(executable, no_triton, "wheel").stub()


def test_old_glibc_is_refused(no_triton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_executable(no_triton / "pytriton/tritonserver/bin/tritonserver")
    monkeypatch.setattr("os.confstr", lambda _: "glibc 2.31")
    with pytest.raises(TritonNotFoundError, match=r"needs Linux with glibc 2\.35 or newer, found glibc 2\.31"):
        find_tritonserver()


def test_install_without_an_index_says_so_and_leaves_nothing(no_triton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(InstallError, match=r"could not install nvidia-pytriton==.*Is a package index reachable"):
        install_triton()
    assert list(no_triton.parent.iterdir()) == []


def test_install_refuses_a_file_with_another_hash(
    no_triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = f"nvidia_pytriton-{binary.WHEEL_VERSION}-py3-none-any.whl"
    (wheels / name).write_bytes(b"not what was pinned")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(InstallError, match=r"(?i)hash"):
        install_triton()
    assert not no_triton.exists()


def test_install_without_pip_or_uv(no_triton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InstallError, match="neither pip nor uv"):
        install_triton()


def test_install_is_idempotent(no_triton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_executable(no_triton / "pytriton/tritonserver/bin/tritonserver")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called again"))
    assert install_triton() == no_triton
