"""Bringing back a model whose process died.

Triton never starts a killed Python stub again, answers its requests with INTERNAL and still calls model and server
ready. So readiness proves nothing: only a real inference does. The supervisor infers on the model's warm-up data
every few seconds while a model is idle (its successful traffic is proof enough otherwise), and for a slow model so
rarely that probes take at most a twentieth of its time.

Where the stubs are our own grandchildren the process table tells sooner: a stub vanished although its model is ready.
Reloading before a request fails also spares Triton a leak: after one failed request to a dead stub the old instance
can never be unloaded.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tritonclient.utils import InferenceServerException

from matteserve_server._errors import ModelLoadError
from matteserve_server.control import Control, Health
from matteserve_server.process import TritonProcess

logger = logging.getLogger("matteserve.server")

_LOOK_S = 0.25
_PROBE_TIMEOUT_S = 10.0
_RELOAD_TIMEOUT_S = 120.0
_IDLE_FACTOR = 20  # seconds between probes per second that a probe takes


@dataclass(frozen=True)
class Recovery:
    """One model that was brought back.

    Attributes:
        model: Its name.
        seconds: From noticing to ready.
    """

    model: str
    seconds: float


@dataclass
class _Watched:
    config: Any
    next_probe: float
    answered: int = 0


@dataclass
class Supervisor:
    """A thread that probes every loaded engine and reloads the dead ones.

    Attributes:
        process: The server's process.
        control: Connection to it.
        interval_s: Seconds between two probes of an idle model.
        recoveries: What was brought back so far, oldest first.
    """

    process: TritonProcess
    control: Control
    interval_s: float
    recoveries: list[Recovery] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._watched: dict[str, _Watched] = {}
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns when no probe is under way."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before = self.process.stubs()
        while not self._ended.wait(_LOOK_S) and self.process.poll() is None:
            living = self.process.stubs()
            vanished = {before[pid] for pid in before.keys() - living.keys()}
            before = living
            try:
                self._look(vanished)
            except InferenceServerException as exc:
                # The server is starting, stopping or overloaded; the next look will tell.
                logger.debug("supervisor: %s", exc)

    def _look(self, vanished: set[str]) -> None:
        now = time.monotonic()
        if not vanished and self._watched and all(watched.next_probe > now for watched in self._watched.values()):
            return
        loaded = self.control.loaded_models()  # a model that somebody unloaded is not brought back
        # An instance that has a successor was replaced, by a load or by a swap there and back, not killed. Asked after
        # the list was read: what is loaded by then has its process.
        killed = {instance.rsplit("_", 2)[0] for instance in vanished - set(self.process.stubs().values())}
        for name in self._watched.keys() - set(loaded):
            del self._watched[name]
        for name in loaded:
            if name not in self._watched:
                self._watched[name] = _Watched(self.control.config(name), next_probe=now + self.interval_s)
            watched = self._watched[name]
            if name in killed or (watched.next_probe <= now and self._is_dead(name, watched)):
                self._bring_back(name, watched)

    def _is_dead(self, name: str, watched: _Watched) -> bool:
        """Probe a model, unless it is an alias or its traffic shows that it is well."""
        began = time.monotonic()
        watched.next_probe = began + self.interval_s
        if watched.config.ensemble_scheduling.step:
            return False
        answered, watched.answered = watched.answered, self.control.statistics(name).inferences
        if watched.answered > answered:
            return False
        health = self.control.probe(watched.config, _PROBE_TIMEOUT_S)
        watched.next_probe += _IDLE_FACTOR * (time.monotonic() - began)
        return health is Health.DEAD

    def _bring_back(self, name: str, watched: _Watched) -> None:
        if self._ended.is_set():
            return
        began = time.monotonic()
        logger.warning("model %s: its process died; reloading it", name)
        try:
            self.control.reload(name, _RELOAD_TIMEOUT_S)
        except ModelLoadError as exc:
            logger.error("%s; trying again in %.0f s", exc, self.interval_s)
        else:
            self.recoveries.append(Recovery(name, time.monotonic() - began))
            logger.warning("model %s: serving again after %.1f s", name, self.recoveries[-1].seconds)
        watched.next_probe = time.monotonic() + self.interval_s
