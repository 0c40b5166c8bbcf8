"""The command line of tritonserver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from matteserve_server import ServerOptions, TritonBinary

CONTAINER = TritonBinary(Path("/opt/tritonserver/bin/tritonserver"), None, "PATH")


def flags(binary: TritonBinary = CONTAINER, backend_directory: Path | None = None, **options: Any) -> list[str]:
    options = {"model_repository": Path("/models"), **options}
    return ServerOptions(**options).command(binary, backend_directory=backend_directory, shm_prefix="prefix_")


def test_http_is_off_and_loopback_is_the_default() -> None:
    command = flags()
    assert command[0] == str(CONTAINER.executable)
    assert {"--allow-http=false", "--grpc-address=127.0.0.1", "--grpc-port=8001", "--metrics-port=8002"} <= set(command)
    assert "--backend-config=python,shm-region-prefix-name=prefix_" in command


def test_http_and_metrics_switches() -> None:
    command = flags(http_port=8000, metrics_port=None, host="0.0.0.0")
    assert {"--http-port=8000", "--http-address=0.0.0.0", "--allow-metrics=false"} <= set(command)
    assert "--allow-http=false" not in command


def test_container_keeps_its_own_backends() -> None:
    assert not [flag for flag in flags() if flag.startswith("--backend-directory")]


def test_wheel_gets_the_private_backend_directory() -> None:
    assert "--backend-directory=/private" in flags(backend_directory=Path("/private"))


def test_extra_arguments_come_last() -> None:
    assert flags(extra_arguments=("--log-verbose=1",))[-1] == "--log-verbose=1"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("grpc_port", 70000, "grpc_port is 70000, must be between 0 and 65535"),
        ("threads", 0, "threads is 0, must be at least 1"),
        ("exit_timeout_s", 0.0, "exit_timeout_s is 0.0, must be positive"),
    ],
)
def test_impossible_options(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flags(**{option: value})


def test_restricted_protocols_give_the_operator_their_key() -> None:
    arguments = ("--grpc-restricted-protocol=model-repository,statistics:admin-key=se=cret", "--log-verbose=1")
    options = ServerOptions(Path("/models"), extra_arguments=arguments)
    assert options.control_headers() == {"triton-grpc-protocol-admin-key": "se=cret"}


def test_the_variant_of_the_configurations_is_the_one_that_triton_is_told(tmp_path: Path):
    assert ServerOptions(tmp_path).config_variant == ""
    assert (
        ServerOptions(tmp_path, extra_arguments=("--log-verbose=1", "--model-config-name=cpu")).config_variant == "cpu"
    )
