"""The private backend directory of the wheel's `tritonserver`.

Triton looks for the backend `NAME` in `<backend directory>/NAME/`. The wheel has only `python`; the directory made here
adds the Python-based backends of this package::

    python/        libtriton_python.so (a copy), stub and utilities of the running interpreter
    onnxruntime/   model.py
    tensorrt/      model.py and plan_backend/, one implementation over two libraries with the same interface
    tensorrt_rtx/  the same again
"""

from __future__ import annotations

import shutil
from pathlib import Path

from matteserve_server.binary import TritonBinary
from matteserve_server.plan_backend.config import LIBRARIES

PYTHON_BASED_BACKENDS = Path(__file__).parent / "backends"
PLAN_BACKEND = Path(__file__).parent / "plan_backend"
_NO_CACHES = shutil.ignore_patterns("__pycache__")
# The stub imports `model.py` by itself and takes this class from it.
_PLAN_MODEL = 'from plan_backend.model import TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'


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
            shutil.copytree(backend, directory / backend.name, ignore=_NO_CACHES)
    for name in LIBRARIES:
        shutil.copytree(PLAN_BACKEND, directory / name / PLAN_BACKEND.name, ignore=_NO_CACHES)
        (directory / name / "model.py").write_text(_PLAN_MODEL)
