"""What the package shows and what it drags in."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources

import pytest

import matteserve_client

HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "scipy", "skimage", "cv2")


def test_all_is_what_is_public() -> None:
    public = {name for name in vars(matteserve_client) if not name.startswith("_")}
    # Not API: what the module imports for itself. The gRPC transports are found by __getattr__, hence not in vars().
    public -= {"Any", "TYPE_CHECKING"}
    lazy = {"AsyncGrpcTransport", "GrpcTransport"}
    assert public - lazy == set(matteserve_client.__all__) - lazy - {"__version__"}
    assert sorted(matteserve_client.__all__) == sorted(set(matteserve_client.__all__))
    for name in matteserve_client.__all__:
        assert getattr(matteserve_client, name) is not None


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'matteserve_client' has no attribute 'Cleint'"):
        _ = matteserve_client.Cleint


def test_every_public_name_is_documented() -> None:
    for name in set(matteserve_client.__all__) - {
        *("INPUT_NAME", "OUTPUT_NAME", "TOLERANCES", "__version__", "ImageSource", "Parity")
    }:
        assert getattr(matteserve_client, name).__doc__, name


def test_py_typed() -> None:
    assert resources.files("matteserve_client").joinpath("py.typed").is_file()


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nimport json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import matteserve_client",
        "import matteserve_client; matteserve_client.Client('127.0.0.1:1').close()",
        "from matteserve_client import *",
        "from click.testing import CliRunner\nfrom matteserve_client._cli import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0",
        "from click.testing import CliRunner\nfrom matteserve_client._cli import cli\n"
        "assert CliRunner().invoke(cli, ['remove', '--help']).exit_code == 0",
    ],
    ids=["import", "client", "star", "help", "remove help"],
)
def test_the_client_is_thin(code: str) -> None:
    loaded = loaded_after(code)
    heavy = {name for name in loaded if name.partition(".")[0] in HEAVY}
    others = {
        name for name in loaded if name.startswith(("matteserve_export", "matteserve_server", "matteserve_bench"))
    }
    assert not heavy
    assert not others


def test_help_needs_no_grpc() -> None:
    assert not {"grpc", "tritonclient"} & loaded_after("import matteserve_client._cli")
