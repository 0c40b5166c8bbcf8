"""The private backend directory of the wheel's `tritonserver`.

Triton looks for the backend `NAME` in `<backend directory>/NAME/`. The wheel has only `python`; the directory made here
adds the Python-based backends of this package::

    python/       libtriton_python.so (a copy), stub and utilities of the running interpreter
    onnxruntime/  model.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from matteserve_server.binary import TritonBinary

PYTHON_BASED_BACKENDS = Path(__file__).parent / "backends"


def compose_backend_directory(binary: TritonBinary, directory: Path) -> None:
    """Fill an empty directory with the backends that the wheel's server can load.

    Args:
        binary: A `tritonserver` from the wheel.
        directory: Where to put them; created if missing.

    Raises:
        TritonNotFoundError: The wheel does not support this Python version.
    """
    assert binary.wheel_root is not None, "NVIDIA's container has its own backend directory"
    wheel_backend = binary.wheel_root / "pytriton" / "tritonserver" / "backends" / "python"
    python = directory / "python"
    python.mkdir(parents=True, exist_ok=True)
    # A symlinked library is refused by Triton ("escapes backend directory"); stub and utilities may be links.
    shutil.copyfile(wheel_backend / "libtriton_python.so", python / "libtriton_python.so")
    (python / "triton_python_backend_utils.py").symlink_to(wheel_backend / "triton_python_backend_utils.py")
    (python / "triton_python_backend_stub").symlink_to(binary.stub())
    for backend in sorted(PYTHON_BASED_BACKENDS.iterdir()):
        if (backend / "model.py").is_file():
            shutil.copytree(backend, directory / backend.name, ignore=shutil.ignore_patterns("__pycache__"))
