"""One engine of a running server, given one setting after the other under load, and put back as it was.

What is tuned is the engine behind an alias: batcher, instances and threads are the engine's, the alias has none. The
load goes through the name that was given: for an alias, as clients send it. A setting is given by loading the engine
with another configuration over Triton's repository API; requests meanwhile are answered by the old one, and no file
changes.

Putting back means loading the configuration that the server had before. A load without one would not do: Triton
compares files, finds none changed, and goes on with what it was given last (seen with 2.51).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_bench._errors import TargetError, TuningError
from matteserve_bench.metrics import summarise
from matteserve_bench.processes import tree_of
from matteserve_bench.records import Load, RecordWriter
from matteserve_bench.session import Session
from matteserve_bench.tuning import Figures, Interrupted, Setting, Space, TrialError
from matteserve_client import MatteserveError
from matteserve_server import ModelLoadError
from matteserve_server.control import Control
from matteserve_server.running import explained

THREADS = "intra_op_thread_count"
THREADS_VARIABLE = "MATTESERVE_ORT_THREADS"
_KIND = model_config_pb2.ModelInstanceGroup
_LEAST_SUCCESS = 0.99
_GPU_INSTANCES = (1, 2, 3)
_OLD_INSTANCES_S = 10.0


class TunedEngine:
    """Measures settings of an engine; one thread uses it, in a `with` block, which puts the engine back.

    Args:
        session: Where the load goes; its model's engine is tuned.
        headers: Sent when models are loaded, such as the key of a restricted protocol.
        cores: Cores for ONNX Runtime's threads; None takes those of the server's process, if it runs here.
        load_timeout_s: Limit of each load of the engine.

    Raises:
        TuningError: The server does not let models be loaded, or the engine has no dynamic batcher or several instance
            groups.
        ControlError: The server's model control needs a key.
    """

    def __init__(
        self,
        session: Session,
        *,
        headers: Mapping[str, str] | None = None,
        cores: int | None = None,
        load_timeout_s: float = 300.0,
    ) -> None:
        self.session = session
        self.name = session.engine
        self.notes: list[str] = []
        self._timeout_s = load_timeout_s
        self._control = Control(session.setup.address, headers)
        self._memory: tuple[Setting, float] | None = None
        try:
            with explained(session.setup.address, has_key=bool(headers)):
                self._control.known_models()
            self.config = self._control.config(self.name)
            _check(self.config)
            self._cores = self._usable_cores(cores)
            self.present = setting_of(self.config, self._cores)
            self._loaded: Setting | None = self.present
            self._check_control()
        except BaseException:
            self._control.close()
            raise

    def __enter__(self) -> TunedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.restore()
        finally:
            self._control.close()

    def space(self, *, most_waiting: int) -> Space:
        """Candidates that make sense for this engine on this server.

        Args:
            most_waiting: Rows that are on their way at one time; 0 if that is open.
        """
        onnx = self.session.contract.engine == "onnx"
        gpu = bool(self.config.instance_group) and self.config.instance_group[0].kind == _KIND.KIND_GPU
        return Space(
            cores=None if self.present.threads is None else self._cores,
            instance_counts=_GPU_INSTANCES if gpu else (),
            largest_batch=0 if onnx else self.present.max_batch_size,  # a plan's profile ends there
            most_waiting=most_waiting,
        )

    def measure(self, setting: Setting, load: Load, writer: RecordWriter | None = None) -> Figures:
        """Give the engine a setting and put load on it.

        Raises:
            TrialError: It does not load, has too little memory, or more than 1 % of its requests fail.
            Interrupted: The session was asked to stop.
        """
        if self.session.stop.is_set():
            raise Interrupted("interrupted")
        self._give(setting)
        try:
            run = self.session.measure(load, writer)
        except MatteserveError as exc:
            raise TrialError(str(exc)) from exc
        if run.end != "finished":
            raise Interrupted("interrupted")
        if not run.records:
            raise TrialError(f"no request was answered in {load.warmup_s + load.duration_s:.0f} s")
        summary = summarise(run)
        if not summary.success >= _LEAST_SUCCESS:
            kinds = ", ".join(f"{kind} {count}" for kind, count in summary.errors.items()) or "nothing was answered"
            raise TrialError(f"requests failed: {kinds}, of {summary.requests}")
        if not summary.images_per_s > 0:
            raise TrialError(f"no request was answered within {load.duration_s:.0f} s; measure longer")
        if summary.server_rss_mib is not None:
            self._memory = setting, summary.server_rss_mib
        return Figures(
            summary.images_per_s,
            summary.latency_ms["p50"],
            summary.latency_ms["p99"],
            summary.mean_batch,
            summary.server_rss_mib,
            "; ".join(summary.verdict.reasons),
        )

    def restore(self) -> None:
        """Load the engine as it was; nothing is done if it is.

        Raises:
            TuningError: It cannot be; the message says what serves.
        """
        if self._loaded == self.present:
            return
        try:
            self._control.load(self.name, self._timeout_s, self.config)
            restored = self._control.config(self.name) == self.config
        except Exception as exc:
            raise TuningError(
                f"{self.name!r} could not be put back ({exc}): it serves with {self._loaded or 'an unknown setting'} "
                "until the server is restarted"
            ) from exc
        if not restored:
            raise TuningError(
                f"{self.name!r} was put back, but {self.session.setup.address} says another configuration than before; "
                "did somebody else load it? Restart the server to be sure"
            )
        self._loaded = self.present

    def load_from_disk(self) -> None:
        """Load the engine as its changed `config.pbtxt` has it.

        Raises:
            ModelLoadError: It does not load; the old one serves on.
        """
        self._control.load(self.name, self._timeout_s)

    def _give(self, setting: Setting) -> None:
        if setting == self._loaded:
            return
        self._check_memory(setting)
        before, self._loaded = self._loaded, None
        try:
            self._control.load(self.name, self._timeout_s, changed(self.config, self.present, setting))
        except ModelLoadError as exc:
            self._loaded = before  # a failed load leaves the old one serving
            raise TrialError(str(exc)) from exc
        self._loaded = setting
        self._wait_until_gone(setting.instances)

    def _processes(self) -> int:
        """How many of the server's processes are instances of the engine; 0 where its backend needs none of its own."""
        instance = re.compile(rf"{re.escape(self.name)}_\d+_\d+")  # what Triton's Python backend calls them
        count = 0
        for process in tree_of(self.session.observer.listener) if self.session.observer.listener else []:
            with contextlib.suppress(psutil.Error):
                count += any(instance.fullmatch(word) for word in process.cmdline())
        return count

    def _wait_until_gone(self, expected: int) -> None:
        """Old instances end after the new ones serve; their memory and CPU time are not this setting's."""
        deadline = time.monotonic() + _OLD_INSTANCES_S
        while self._processes() > expected and time.monotonic() < deadline:
            if self.session.stop.wait(0.05):
                return

    def _check_control(self) -> None:
        """Load the engine as it is: whether the server allows it must be known before anything is measured."""
        try:
            self._control.load(self.name, self._timeout_s, self.config)
        except ModelLoadError as exc:
            raise TuningError(
                f"{self.session.setup.address} does not let engines be loaded with another configuration ({exc}); "
                "start it with --model-control-mode=explicit, as `matteserve serve` does, or leave out --address"
            ) from exc

    def _check_memory(self, setting: Setting) -> None:
        """More instances need more memory, and while they load the old ones are still there."""
        if self._memory is None or self.session.observer.listener is None:
            return
        known, mib = self._memory
        needed, available = mib * setting.instances / known.instances, psutil.virtual_memory().available / 2**20
        if setting.instances > known.instances and needed > available:
            raise TrialError(
                f"needs about {needed:.0f} MiB besides what is loaded, {available:.0f} MiB are available"
            )  # fmt: skip

    def _usable_cores(self, cores: int | None) -> int | None:
        """Cores for the engine's threads; None, with a note, where they cannot be tuned."""
        group = self.config.instance_group[0] if self.config.instance_group else None
        if self.config.backend != "onnxruntime" or (group is not None and group.kind == _KIND.KIND_GPU):
            return None
        listener = self.session.observer.listener
        if listener is None:
            if cores is None:
                self.notes.append("instances and threads are not tried: the server runs elsewhere, say its --cores")
            return cores
        fixed = ""
        with contextlib.suppress(psutil.Error):
            fixed = listener.environ().get(THREADS_VARIABLE, "")
        if fixed:
            self.notes.append(
                f"instances and threads are not tried: the server was started with {fixed} threads for every engine "
                f"(--threads, or {THREADS_VARIABLE}), which overrides what an engine says"
            )
            return None
        return cores or len(listener.cpu_affinity())


def setting_of(config: Any, cores: int | None) -> Setting:
    """The setting that a configuration has.

    Args:
        config: An `inference.ModelConfig`, as the server has it.
        cores: Threads of an instance that names none; None leaves threads alone.
    """
    preferred = tuple(config.dynamic_batching.preferred_batch_size)
    return Setting(
        instances=config.instance_group[0].count if config.instance_group else 1,
        threads=None
        if cores is None
        else int(config.parameters[THREADS].string_value or cores)
        if THREADS in config.parameters
        else cores,
        max_batch_size=config.max_batch_size,
        # Triton fills in the largest batch where the file names none.
        preferred=() if preferred == (config.max_batch_size,) else preferred,
        delay_us=config.dynamic_batching.max_queue_delay_microseconds,
    )


def changed(config: Any, present: Setting, wanted: Setting) -> Any:
    """A copy of a configuration in which only that is changed in which two settings differ."""
    result = model_config_pb2.ModelConfig()
    result.CopyFrom(config)
    batcher = result.dynamic_batching
    if wanted.instances != present.instances:
        group = result.instance_group[0] if result.instance_group else result.instance_group.add()
        group.count = wanted.instances
    if wanted.threads != present.threads:
        result.parameters[THREADS].string_value = str(wanted.threads)
    if (wanted.max_batch_size, wanted.preferred) != (present.max_batch_size, present.preferred):
        result.max_batch_size = wanted.max_batch_size
        del batcher.preferred_batch_size[:]
        batcher.preferred_batch_size.extend(wanted.preferred)
    if wanted.delay_us != present.delay_us:
        batcher.max_queue_delay_microseconds = wanted.delay_us
    return result


def read_config(path: Path) -> Any:
    """Parse a `config.pbtxt`.

    Raises:
        TuningError: It cannot be read or parsed.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as exc:
        raise TuningError(f"cannot read {path}: {exc}; is --model-repository the one that the server reads?") from exc


def config_path(session: Session, repository: Path | None) -> Path | None:
    """The file from which the server has an engine's configuration; None if it is not to be seen from here.

    Args:
        session: A session on the server.
        repository: The server's repository as seen from here; None takes it from the server's command line.

    Raises:
        TargetError: A repository was named, and the engine is not in it.
    """
    variant, repositories = "", [] if repository is None else [repository]
    for option, value in _command_line(session):
        if option in ("--model-repository", "--model-store") and repository is None:
            repositories.append(Path(value))
        elif option == "--model-config-name":
            variant = value
    for root in repositories:
        folder = root / session.engine
        for path in (folder / "configs" / f"{variant}.pbtxt", folder / "config.pbtxt"):
            if path.is_file():
                return path
    if repository is not None:
        raise TargetError(f"{repository} has no {session.engine}/config.pbtxt; name the server's --model-repository")
    return None


def _command_line(session: Session) -> Iterator[tuple[str, str]]:
    listener = session.observer.listener
    words: list[str] = []
    if listener is not None:
        with contextlib.suppress(psutil.Error):
            words = listener.cmdline()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        yield option, value if equals else following


def _check(config: Any) -> None:
    if not config.HasField("dynamic_batching"):
        raise TuningError(
            f"engine {config.name!r} has no dynamic batching, so that there is no batcher to tune; add "
            '"dynamic_batching { }" to its config.pbtxt and load it, or export it again'
        )
    if len(config.instance_group) > 1:
        raise TuningError(
            f"engine {config.name!r} has {len(config.instance_group)} instance groups; only one can be tuned"
        )
