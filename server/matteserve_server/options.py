"""What a server is started with, and the command line that it becomes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matteserve_server.binary import TritonBinary

_RESTRICTION = re.compile(r"--grpc-restricted-protocol=[^:]+:(?P<key>[^=]+)=(?P<value>.+)")


@dataclass(frozen=True)
class ServerOptions:
    """Options of one `tritonserver`.

    Attributes:
        model_repository: Directory with the models.
        models: Names to load; empty for every alias of the repository.
        host: Address to listen on.
        grpc_port: gRPC port; 0 takes a free one.
        metrics_port: Prometheus metrics' port; 0 takes a free one, None switches metrics off.
        http_port: HTTP port; None (the default) keeps HTTP off: an idle HTTP connection blocks a clean exit.
        threads: ONNX Runtime's intra-op threads per instance; None leaves it to each model.
        start_timeout_s: Seconds until the server answers and every model is loaded.
        exit_timeout_s: Seconds that requests in flight get to finish after SIGTERM; SIGKILL follows.
        probe_interval_s: Seconds between two looks of the supervisor at each model; 0 switches supervision off.
        verbose: Forward all of Triton's log, not only its warnings and errors.
        tritonserver: An explicit program; None searches for one.
        extra_arguments: More arguments for `tritonserver`, as they are.
    """

    model_repository: Path
    models: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    metrics_port: int | None = 8002
    http_port: int | None = None
    threads: int | None = None
    start_timeout_s: float = 120.0
    exit_timeout_s: float = 30.0
    probe_interval_s: float = 2.0
    verbose: bool = False
    tritonserver: Path | None = None
    extra_arguments: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("grpc_port", "metrics_port", "http_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ValueError(f"{name} is {port}, must be between 0 and 65535")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, must be at least 1")
        for name in ("start_timeout_s", "exit_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive")

    @property
    def config_variant(self) -> str:
        """Name of the configurations that Triton reads instead of `config.pbtxt`; empty for none."""
        flag = "--model-config-name="
        names = [argument.removeprefix(flag) for argument in self.extra_arguments if argument.startswith(flag)]
        return names[-1] if names else ""

    def control_headers(self) -> dict[str, str]:
        """Headers with which the operator's own calls pass the `--grpc-restricted-protocol` of `extra_arguments`."""
        restrictions = (_RESTRICTION.fullmatch(argument) for argument in self.extra_arguments)
        return {f"triton-grpc-protocol-{found['key']}": found["value"] for found in restrictions if found}

    def command(self, binary: TritonBinary, *, backend_directory: Path | None, shm_prefix: str) -> list[str]:
        """The command line of `tritonserver`.

        Args:
            binary: The program.
            backend_directory: Private backend directory; None leaves the program its own.
            shm_prefix: Prefix of the shared-memory regions that the Python backend makes.
        """
        command = [
            str(binary.executable),
            f"--model-repository={self.model_repository.absolute()}",
            # Models are loaded by name over gRPC once the server answers, so that each failure has its own message.
            "--model-control-mode=explicit",
            "--strict-readiness=false",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            "--allow-sagemaker=false",
            "--allow-vertex-ai=false",
            f"--exit-timeout-secs={max(1, round(self.exit_timeout_s))}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        ]
        if backend_directory is not None:
            command.append(f"--backend-directory={backend_directory}")
            # Configurations here are complete; without a probe process for each model a load takes 0.2 s, not 1.4 s.
            command.append("--disable-auto-complete-config")
            # The wheel's build looks for a GPU's management library and pinned memory, and complains without them.
            command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
        if self.http_port is None:
            command.append("--allow-http=false")
        else:
            command += [f"--http-address={self.host}", f"--http-port={self.http_port}"]
        if self.metrics_port is None:
            command.append("--allow-metrics=false")
        else:
            command += [f"--metrics-address={self.host}", f"--metrics-port={self.metrics_port}"]
        return [*command, *self.extra_arguments]
