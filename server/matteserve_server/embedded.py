"""A real Triton Inference Server as a context manager."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from matteserve_server import shared_memory
from matteserve_server._errors import StartError
from matteserve_server.backend_directory import compose_backend_directory
from matteserve_server.binary import TritonBinary, find_tritonserver
from matteserve_server.control import Control
from matteserve_server.machine import this_machine
from matteserve_server.options import ServerOptions
from matteserve_server.ports import check_port
from matteserve_server.process import TritonProcess
from matteserve_server.repository import Repository
from matteserve_server.supervisor import Supervisor

logger = logging.getLogger("matteserve.server")


class EmbeddedServer:
    """A `tritonserver` that runs as long as the `with` block, its models loaded and supervised.

    One thread starts and stops it; any thread or process may call it at :attr:`address`.

    >>> with EmbeddedServer(ServerOptions(Path("model_repository"), grpc_port=0)) as server:
    ...     with Client(server.address) as client:
    ...         cutout = client.remove("photo.jpg")

    Args:
        options: What to serve, and where.

    Raises:
        TritonNotFoundError: (on start) No `tritonserver` on this machine.
        RepositoryError: (on start) The repository is missing or broken, a model is not in it, or
            (`EngineMismatchError`) a plan was built for another TensorRT or GPU.
        ResourceError: (on start) A port is taken, or /dev/shm is too small.
        StartError: (on start) The server ended, or a model did not load.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.models: tuple[str, ...] = ()
        self._resources = contextlib.ExitStack()
        self._process: TritonProcess | None = None
        self._control: Control | None = None
        self._supervisor: Supervisor | None = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """`host:port` for gRPC."""
        return f"{self.options.host}:{self.options.grpc_port}"

    @property
    def process(self) -> TritonProcess:
        """The running process."""
        if self._process is None:
            raise StartError("the server is not running; call start() or use it as a context manager")
        return self._process

    @property
    def control(self) -> Control:
        """The operator's connection: load, statistics."""
        if self._control is None:
            raise StartError("the server is not running; call start() or use it as a context manager")
        return self._control

    @property
    def supervisor(self) -> Supervisor | None:
        """The supervisor; None if it is switched off."""
        return self._supervisor

    def start(self) -> None:
        """Start the server, load the models, begin to supervise; nothing is left running if that fails."""
        repository = Repository.read(self.options.model_repository, self.options.config_variant)
        models = self.options.models or tuple(repository.default_models())
        repository.check(models)
        binary = find_tritonserver(self.options.tritonserver)
        if repository.plans_of(models):
            repository.check(models, this_machine(native_backends=binary.wheel_root is None))
        if stale := shared_memory.remove_stale_regions():
            logger.info("removed %d shared-memory regions of servers that were killed", len(stale))
        if binary.wheel_root is not None:
            shared_memory.check_room(repository.engines_of(models))
        try:
            self._start(binary, models)
        except BaseException:
            self.stop()
            raise

    def _start(self, binary: TritonBinary, models: tuple[str, ...]) -> None:
        backend_directory = None
        if binary.wheel_root is not None:
            backend_directory = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="matteserve-")))
            compose_backend_directory(binary, backend_directory)
        self.options = _with_ports(self.options)
        shm_prefix = shared_memory.new_prefix()
        command = self.options.command(binary, backend_directory=backend_directory, shm_prefix=shm_prefix)
        environment = binary.environment()
        if self.options.threads is not None:
            environment["MATTESERVE_ORT_THREADS"] = str(self.options.threads)
        logger.debug("starting %s (%s)", " ".join(command), binary.source)
        process = self._process = TritonProcess(command, environment, shm_prefix)
        control = self._control = Control(_reachable(self.address), self.options.control_headers())
        deadline = time.monotonic() + self.options.start_timeout_s
        try:
            control.wait_until_live(self.options.start_timeout_s, lambda: process.poll() is None)
        except StartError as exc:
            raise StartError(f"{exc}; its last words:\n  " + "\n  ".join(process.last_log_lines())) from exc
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="load") as pool:
            list(pool.map(lambda name: control.load(name, max(1.0, deadline - time.monotonic())), models))
        self.models = models
        if self.options.probe_interval_s > 0:
            self._supervisor = Supervisor(process, control, self.options.probe_interval_s)
            self._supervisor.start()

    def wait(self, until: threading.Event | None = None) -> int | None:
        """Wait until the server ends or an event is set.

        Returns:
            The exit code if the server ended by itself, else None.
        """
        while until is None or not until.wait(0.2):
            if (code := self.process.poll()) is not None:
                return code
            if until is None:
                time.sleep(0.2)
        return None

    def stop(self) -> int:
        """Drain and end the server, remove what it left; return its exit code. Harmless if it is not running."""
        code = 0
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._process is not None:
            code = self._process.stop(self.options.exit_timeout_s)
        if self._control is not None:
            self._control.close()
        self._resources.close()
        self._process = self._control = self._supervisor = None
        return code


def _with_ports(options: ServerOptions) -> ServerOptions:
    """Check that the ports can be bound and replace each 0 by a free one."""
    return dataclasses.replace(
        options,
        grpc_port=check_port(options.host, options.grpc_port, "--grpc-port"),
        metrics_port=_optional_port(options.host, options.metrics_port, "--metrics-port"),
        http_port=_optional_port(options.host, options.http_port, "--http-port"),
    )


def _optional_port(host: str, port: int | None, flag: str) -> int | None:
    return None if port is None else check_port(host, port, flag)


def _reachable(address: str) -> str:
    """The address for a client on this machine: a server that listens everywhere is reached at loopback."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"0.0.0.0", "::", ""} else address
