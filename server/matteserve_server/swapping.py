"""Moving an alias from one engine to another under load, without losing a request, and back.

The steps, in order::

    check    the engine exists, its file is the one that was built, nobody else is swapping
    load     the server loads it beside the one that serves; its warm-up and one inference pass
    verify   both engines answer the same pictures on the server; the difference is within the tolerance
    write    the alias' config.pbtxt on disk points at it: from here on a restart serves the new engine
    switch   the server loads the alias; requests that came before are answered by the old engine
    watch    failures and drift of the answers; if it does badly the alias is moved back
    unload   the old engine goes when no alias points at it and nobody calls it by its own name

Until `switch` the old engine serves, and it stays loaded until the watch is over. A process that is killed at any step
leaves a repository that starts: the alias on disk always points at an engine that was verified. The next swap or
rollback finds in the journal (:mod:`matteserve_server.swap_state`) what was under way and finishes or undoes it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from tritonclient.utils import InferenceServerException

from matteserve_client import AlphaDifference, AlphaTolerance, GrpcTransport, MatteserveError, ModelContract
from matteserve_server import preflight
from matteserve_server._errors import (
    RolledBackError,
    SwapError,
    UnknownModelError,
    VerificationError,
)
from matteserve_server.alias import moved_from, note_moved_from, pointed_at, target_of, write_config
from matteserve_server.control import Control, Health
from matteserve_server.manifest import Manifest, read_manifest
from matteserve_server.repository import Repository, read_model
from matteserve_server.running import explained, unload_if_unused, watch
from matteserve_server.swap_state import Journal, Kind, Pending, lock, now_utc, read_journal, write_journal
from matteserve_server.verification import Verified, generate_images, load_images, tolerance_between, verify

logger = logging.getLogger("matteserve.server")

Step = Literal["check", "load", "verify", "write", "switch", "watch", "unload"]
STEPS: tuple[Step, ...] = ("check", "load", "verify", "write", "switch", "watch", "unload")

_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class SwapOptions:
    """Where to swap, and how careful to be.

    Attributes:
        address: `host:port` of the server's gRPC endpoint.
        model_repository: The server's repository, as seen from here; None changes the server only, until it restarts.
        control_key: `NAME=VALUE` as in the server's `--grpc-restricted-protocol=...:NAME=VALUE`.
        images: Directory with pictures to verify with; None draws some.
        tolerance: What the engines' answers may differ by; None takes what their manifests say.
        watch_s: Seconds to watch the new engine before the old one is unloaded.
        max_error_rate: Share of failed requests during the watch above which the alias is moved back.
        keep_old: Leave the old engine loaded.
        quiet_s: Seconds without an answer after which the old engine counts as called by nobody. Triton's batcher was
            seen to sit on a single request for half a second.
        load_timeout_s: Seconds that loading an engine may take.
        infer_timeout_s: Seconds that one answer may take while verifying.
    """

    address: str = "127.0.0.1:8001"
    model_repository: Path | None = None
    control_key: str | None = None
    images: Path | None = None
    tolerance: AlphaTolerance | None = None
    watch_s: float = 30.0
    max_error_rate: float = 0.01
    keep_old: bool = False
    quiet_s: float = 2.0
    load_timeout_s: float = 600.0
    infer_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.control_key is not None and not all(self.control_key.partition("=")[::2]):
            raise ValueError("control_key must be NAME=VALUE, as after the colon of --grpc-restricted-protocol")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate is {self.max_error_rate}, must be between 0 and 1")
        if self.watch_s < 0:
            raise ValueError(f"watch_s is {self.watch_s}, must not be negative")

    def headers(self) -> dict[str, str]:
        """Headers that pass the server's restriction."""
        if self.control_key is None:
            return {}
        name, _, value = self.control_key.partition("=")
        return {f"triton-grpc-protocol-{name}": value}


@dataclass
class SwapResult:
    """What a swap or rollback did.

    Attributes:
        model: The alias.
        kind: "swap" or "rollback".
        source: Engine that it pointed at.
        target: Engine that it points at now.
        changed: Whether anything had to be changed.
        persistent: Whether a restart of the server keeps it.
        difference: The new engine's answers against the old one's; None for a rollback.
        tolerance: What they were held to.
        requests: Requests that the alias answered during the watch.
        failures: Requests that it failed.
        unloaded: Engines that were unloaded.
        seconds: Duration of each step.
        notes: What a person should know besides.
    """

    model: str
    kind: Kind
    source: str
    target: str
    changed: bool = True
    persistent: bool = True
    difference: AlphaDifference | None = None
    tolerance: AlphaTolerance | None = None
    requests: int = 0
    failures: int = 0
    unloaded: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return asdict(self)


def swap(model: str, engine: str, options: SwapOptions | None = None) -> SwapResult:
    """Point an alias at another engine of its model; see :class:`Swap`."""
    with Swap(model, options or SwapOptions()) as operation:
        return operation.to(engine)


def rollback(model: str, options: SwapOptions | None = None) -> SwapResult:
    """Point an alias at the engine before; see :class:`Swap`."""
    with Swap(model, options or SwapOptions()) as operation:
        return operation.back()


class Swap:
    """One swap or rollback of one model on one server; used once, by one thread.

    ::

        with Swap("birefnet", SwapOptions(model_repository=Path("model_repository"))) as operation:
            result = operation.to("trt_fp16")

    Args:
        model: The alias that clients call.
        options: Where, and how careful.
        on_step: Called when a step begins, with its name.
    """

    def __init__(self, model: str, options: SwapOptions, *, on_step: Callable[[Step], None] | None = None) -> None:
        self.model = model
        self.options = options
        self._on_step = on_step or (lambda step: None)
        self._control = Control(options.address, options.headers())
        self._transport = GrpcTransport(options.address, headers=options.headers())
        self._folder = None if options.model_repository is None else options.model_repository / model
        self._journal = Journal()
        self._step: Step = "check"

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()
        self._control.close()

    def check(self, engine: str) -> SwapResult:
        """Do the first step only, and change nothing: what `to` would start from.

        Args:
            engine: As for `to`.

        Raises:
            MatteserveError: As `to` would.
        """
        with self._explained():
            return self._check(self._engine_name(engine))

    def to(self, engine: str) -> SwapResult:
        """Point the alias at another engine.

        Args:
            engine: `<engine>_<precision>` such as "trt_fp16", or the engine's full name.

        Raises:
            UnknownModelError: There is no such alias or engine.
            EngineMismatchError: The engine's file is not the one that was built, or was built for another machine.
            SwapBusyError: Another swap of this model is going on.
            ControlError: The server cannot be reached, or the control key is missing or wrong.
            ModelLoadError: The engine does not load.
            VerificationError: Its answers are not those of the old engine.
            RolledBackError: It served, did badly, and the old engine serves again.
            SwapError, RepositoryError: Something else is in the way; the old engine serves.
        """
        with self._explained(), self._locked(f"swap to {engine}"):
            self._recover()
            target = self._engine_name(engine)
            return self._move("swap", self._check(target))

    def back(self) -> SwapResult:
        """Point the alias at the engine before the last swap; what served is not asked, for it may be broken.

        Without a repository it is the engine before the last swap of the server only; if there was none, the server
        reads the alias from its own disk again.

        Raises:
            SwapError: There is nothing to go back to.
            MatteserveError: As for `to`.
        """
        with self._explained(), self._locked("rollback"):
            self._recover()
            if self._folder is None:
                return self._back_on_server()
            self._journal.forget(self._target_on_disk())
            if not self._journal.previous:
                raise SwapError(
                    f"{self.model!r} has no engine to roll back to: no swap is remembered in {self._folder}; name one "
                    f"with `matteserve swap {self.model} --to ...`"
                )
            return self._move("rollback", self._check(self._journal.previous[-1]))

    def _move(self, kind: Kind, result: SwapResult) -> SwapResult:
        result.kind = kind
        if not result.changed:
            return result
        source, target = result.source, result.target
        was_loaded = target in self._control.loaded_models()
        pending = self._journal.pending = Pending(kind, source, target, "load", now_utc())
        verified = None
        try:
            with self._timed("load", result):
                self._control.load(target, self.options.load_timeout_s)
                self._probe(target)
                alias, moved = self._alias_configs(target)
                if self._folder is None:
                    note_moved_from(moved, [*moved_from(alias), source])
            if kind == "swap":  # a rollback does not ask: what serves now may be the broken one
                with self._timed("verify", result):
                    verified = self._verify(result)
        except BaseException:
            self._give_up(pending, unload=not was_loaded)
            raise
        try:
            with self._explained():
                if self._folder is not None:
                    with self._timed("write", result):
                        self._write_alias(source, moved)
                with self._timed("switch", result):
                    self._control.load(self.model, self.options.load_timeout_s, None if self._folder else moved)
                    self._check_switched(target)
                if verified is not None:
                    with self._timed("watch", result):
                        result.requests, result.failures = watch(
                            self._control,
                            self._transport,
                            self.model,
                            target,
                            verified,
                            seconds=self.options.watch_s,
                            max_error_rate=self.options.max_error_rate,
                            timeout_s=self.options.infer_timeout_s,
                        )
        except BaseException as exc:
            served = self._step == "watch"
            end = self._move_back(pending, alias, unload=not was_loaded)
            if isinstance(exc, MatteserveError):
                raise (RolledBackError if served else SwapError)(f"{exc}; {end}") from exc
            raise
        if not self.options.keep_old:
            with self._timed("unload", result):
                self._unload(source, result)
        self._close_journal(pending, "done", moved=True)
        return result

    # -- check -------------------------------------------------------------------------------------------------------

    def _engine_name(self, engine: str) -> str:
        return engine if engine.startswith(f"{self.model}_") else f"{self.model}_{engine}"

    def _check(self, target: str) -> SwapResult:
        result = SwapResult(self.model, "swap", "", target, persistent=self._folder is not None)
        with self._timed("check", result):
            loaded = self._control.loaded_models()
            if self.model not in loaded:
                raise UnknownModelError(
                    f"{self.options.address} has not loaded {self.model!r}; it has {', '.join(loaded) or 'no model'}"
                )
            result.source = target_of(self._control.config(self.model))
            if self._folder is None:
                self._check_known(target, self._control.known_models())
            else:
                self._check_on_disk(result)
            result.changed = result.source != target
        return result

    def _check_on_disk(self, result: SwapResult) -> None:
        assert self._folder is not None
        on_disk = self._target_on_disk()
        if on_disk != result.source:
            raise SwapError(
                f"{self.model!r} points at {result.source!r} in the server and at {on_disk!r} in "
                f"{self._folder.parent}: is that the repository which this server reads? If it is, "
                f"`matteserve rollback {self.model} --server-only` makes the server read it again; if not, name the "
                "right one with --model-repository, or use --server-only"
            )
        folder = self._folder.parent / result.target
        self._check_known(
            result.target, [p.name for p in self._folder.parent.iterdir() if (p / "config.pbtxt").is_file()]
        )
        repository = Repository(self._folder.parent, {result.target: read_model(folder)})
        repository.check([result.target])
        preflight.check_files(folder, repository.models[result.target].config)
        pointed_at(read_model(self._folder).config, repository.models[result.target].config)

    def _check_known(self, target: str, known: list[str]) -> None:
        if target not in known:
            engines = [name for name in known if name.startswith(f"{self.model}_")]
            raise UnknownModelError(
                f"{self.model!r} has no engine {target!r}; it has {', '.join(sorted(engines)) or 'none'}. "
                "Make one with `matteserve build`"
            )

    def _target_on_disk(self) -> str:
        assert self._folder is not None
        if not (self._folder / "config.pbtxt").is_file():
            raise UnknownModelError(
                f"no model {self.model!r} in {self._folder.parent}; is that the server's repository? A server whose "
                "repository is elsewhere is swapped with --server-only"
            )
        return target_of(read_model(self._folder).config)

    # -- load and verify ---------------------------------------------------------------------------------------------

    def _probe(self, engine: str) -> None:
        health = self._control.probe(self._control.config(engine), _PROBE_TIMEOUT_S)
        if health in (Health.DEAD, Health.ABSENT):
            raise VerificationError(f"{engine!r} was loaded and does not answer: {health.value}; see the server's log")

    def _alias_configs(self, target: str) -> tuple[Any, Any]:
        """The alias' configuration as it is and as it will be."""
        alias = self._control.config(self.model) if self._folder is None else read_model(self._folder).config
        return alias, pointed_at(alias, self._control.config(target))

    def _verify(self, result: SwapResult) -> Verified:
        new, old = result.target, result.source
        configs = [self._control.config(name) for name in (new, old)]
        contracts = [ModelContract.from_config(config) for config in configs]
        images = (
            generate_images(contracts[0])
            if self.options.images is None
            else load_images(self.options.images, contracts[0])
        )
        verified = verify(
            self._transport,
            new,
            old,
            images,
            self.options.tolerance or tolerance_between(self._manifest(new), self._manifest(old), contracts),
            max_batch_size=max(1, configs[0].max_batch_size),
            timeout_s=self.options.infer_timeout_s,
        )
        result.difference, result.tolerance = verified.difference, verified.tolerance
        if all(np.ptp(reference) <= 1 for reference in verified.references):
            result.notes.append(
                f"{old!r} found nothing in any of the pictures, so the comparison says little; use --images with yours"
            )
        return verified

    def _manifest(self, engine: str) -> Manifest | None:
        return None if self._folder is None else read_manifest(self._folder.parent / engine / "1")

    # -- write, switch, watch ----------------------------------------------------------------------------------------

    def _write_alias(self, source: str, config: Any) -> None:
        assert self._folder is not None
        if (now := self._target_on_disk()) != source:
            raise SwapError(f"{self.model!r} was pointed at {now!r} by somebody else meanwhile; it is left as it is")
        write_config(self._folder, config)

    def _check_switched(self, target: str) -> None:
        found = target_of(self._control.config(self.model))
        if found != target:
            raise SwapError(
                f"the server loaded {self.model!r} again and still points at {found!r}: it reads another repository "
                f"than {self.options.model_repository}, or a variant of the configuration (--model-config-name); name "
                "the right one with --model-repository, or use --server-only"
            )

    # -- undo --------------------------------------------------------------------------------------------------------

    def _give_up(self, pending: Pending, *, unload: bool) -> None:
        """Nothing was switched: forget it, and unload what was loaded for it."""
        with self._best_effort("writing the journal"):
            self._close_journal(pending, f"given up at {self._step}", moved=False)
        if unload:
            with self._best_effort(f"unloading {pending.target}"):
                self._unload_if_unused(pending.target)

    def _move_back(self, pending: Pending, alias: Any, *, unload: bool) -> str:
        """Point the alias at the old engine, on disk and in the server; say how that ended."""
        step = self._step
        failed: list[str] = []
        with self._best_effort("writing the alias back", failed):
            if self._folder is not None and self._target_on_disk() == pending.target:
                write_config(self._folder, alias)
        with self._best_effort("loading the alias again", failed):
            self._control.load(self.model, self.options.load_timeout_s, None if self._folder else alias)
            self._check_switched(pending.source)
        with self._best_effort("writing the journal"):
            self._close_journal(pending, f"moved back at {step}", moved=False)
        if failed:
            return f"moving it back to {pending.source!r} failed too: {'; '.join(failed)}"
        if unload:
            with self._best_effort(f"unloading {pending.target}"):
                self._unload_if_unused(pending.target)
        return f"{pending.source!r} serves"

    def _back_on_server(self) -> SwapResult:
        # Loading the alias without a configuration would not do: Triton sees unchanged files and keeps the last one.
        loaded = self._control.config(self.model)
        result = SwapResult(self.model, "rollback", target_of(loaded), "")
        earlier, before = moved_from(loaded), None
        if earlier:
            with self._timed("load", result):
                self._control.load(earlier[-1], self.options.load_timeout_s)
                self._probe(earlier[-1])
            before = pointed_at(loaded, self._control.config(earlier[-1]))
            note_moved_from(before, earlier[:-1])
        with self._timed("switch", result):
            self._control.load(self.model, self.options.load_timeout_s, before)
        result.target = target_of(self._control.config(self.model))
        result.changed = result.source != result.target
        if not self.options.keep_old and result.changed:
            with self._timed("unload", result):
                self._unload(result.source, result)
        return result

    # -- unload ------------------------------------------------------------------------------------------------------

    def _unload(self, engine: str, result: SwapResult) -> None:
        """Unload an engine that nobody needs; not being able to is worth a note, not a failure."""
        with self._best_effort(f"unloading {engine}", result.notes):
            if reason := self._unload_if_unused(engine):
                result.notes.append(reason)
            else:
                result.unloaded.append(engine)

    def _unload_if_unused(self, engine: str) -> str:
        return unload_if_unused(self._control, engine, quiet_s=self.options.quiet_s)

    # -- journal -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, doing: str) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        self._target_on_disk()  # says it if there is no such alias, before a lock file is made
        with lock(self._folder, f"{doing} of {self.model}"):
            self._journal = read_journal(self._folder)
            yield

    def _recover(self) -> None:
        """Finish or undo what a killed process left: the alias on disk says which."""
        pending = self._journal.pending
        if pending is None or self._folder is None:
            return
        on_disk = self._target_on_disk()
        moved = on_disk == pending.target
        logger.warning(
            "the %s of %s to %s was interrupted at step %s: %s",
            pending.kind, self.model, pending.target, pending.step, "finishing it" if moved else "undoing it",
        )  # fmt: skip
        if self.model in self._control.loaded_models() and target_of(self._control.config(self.model)) != on_disk:
            self._control.load(self.model, self.options.load_timeout_s)
            self._check_switched(on_disk)
        self._close_journal(pending, "finished after an interruption" if moved else "undone", moved=moved)
        with self._best_effort("unloading what is not needed"):
            self._unload_if_unused(pending.source if moved else pending.target)

    def _close_journal(self, pending: Pending, outcome: str, *, moved: bool) -> None:
        self._journal.finish(pending, outcome, moved=moved)
        if self._folder is not None:
            write_journal(self._folder, self._journal)

    @contextlib.contextmanager
    def _timed(self, step: Step, result: SwapResult) -> Iterator[None]:
        """Announce a step, note it in the journal, and measure it."""
        began = time.monotonic()
        self._step = step
        if self._folder is not None and self._journal.pending is not None:
            self._journal.pending = replace(self._journal.pending, step=step)
            write_journal(self._folder, self._journal)
        self._on_step(step)
        yield
        result.seconds[step] = round(time.monotonic() - began, 3)

    # -- failures ----------------------------------------------------------------------------------------------------

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.options.address, has_key=self.options.control_key is not None)

    @contextlib.contextmanager
    def _best_effort(self, what: str, notes: list[str] | None = None) -> Iterator[None]:
        """Go on after a failure, for clean-up must not hide what it cleans up after."""
        try:
            yield
        except (InferenceServerException, MatteserveError, OSError) as exc:
            logger.warning("%s: %s", what, exc)
            if notes is not None:
                notes.append(f"{what}: {exc}")
