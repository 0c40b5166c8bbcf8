"""What an operator does to a running server besides loading: unload what nobody needs, watch what now serves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tritonclient.utils import InferenceServerException

from matteserve_client import Transport, alpha_difference
from matteserve_server._errors import ControlError, RolledBackError
from matteserve_server.control import Control
from matteserve_server.verification import Verified, answers

_UNLOAD_TIMEOUT_S = 60.0
_QUIET_WINDOWS = 5  # how often a quiet time is waited for
_WATCH_INTERVAL_S = 0.5


def unload_if_unused(control: Control, engine: str, *, quiet_s: float) -> str:
    """Unload an engine that no loaded alias points at and that nobody calls.

    Requests that came through an alias before it moved are no reason to wait: Triton answers them before it unloads. A
    client that calls the engine by its own name is.

    Args:
        control: Connection to the server.
        engine: What to unload.
        quiet_s: An engine that answered nothing for so many seconds is taken for uncalled.

    Returns:
        Why it stays loaded; empty if it was unloaded.

    Raises:
        InferenceServerException: The server refuses.
    """
    loaded = control.loaded_models()
    if engine not in loaded:
        return f"{engine} was not loaded any more"
    users = [
        name
        for name in loaded
        if any(step.model_name == engine for step in control.config(name).ensemble_scheduling.step)
    ]
    if users:
        return f"{engine} stays loaded: {', '.join(users)} points at it"
    if not _becomes_quiet(control, engine, quiet_s):
        return f"{engine} stays loaded: somebody calls it by its own name"
    control.unload(engine, _UNLOAD_TIMEOUT_S)
    return ""


def watch(
    control: Control,
    transport: Transport,
    alias: str,
    engine: str,
    verified: Verified,
    *,
    seconds: float,
    max_error_rate: float,
    timeout_s: float,
) -> tuple[int, int]:
    """Look at the failures of an alias and its engine, and at the alias' answers, for a while.

    Args:
        control: Connection for the counters.
        transport: Connection for the pictures.
        alias: What clients call.
        engine: What it points at.
        verified: Pictures, the old engine's answers, and what the new ones may differ by.
        seconds: How long; at least one look is taken.
        max_error_rate: Share of failed requests that is too much. Requests that a full queue refused count: an engine
            that is slower than the old one shows in that way.
        timeout_s: Seconds to wait for each answer.

    Returns:
        Requests to the alias, and how many of them failed.

    Raises:
        RolledBackError: It does badly. (Moving it back is the caller's.)
        MatteserveError: It does not answer.
    """
    before = {name: control.statistics(name) for name in (alias, engine)}
    deadline = time.monotonic() + seconds
    look = 0
    while True:
        index = look % len(verified.images)
        look += 1
        image, reference = verified.images[index : index + 1], verified.references[index : index + 1]
        found = answers(transport, alias, image, timeout_s=timeout_s)
        if violations := alpha_difference(found, reference).violations(verified.tolerance):
            raise RolledBackError(
                f"{engine!r} drifted while it served: {'; '.join(violations)} on picture {index}, which it had passed"
            )
        counts = {}
        for name, start in before.items():
            now = control.statistics(name)
            failures = now.failures - start.failures
            requests = failures + now.successes - start.successes
            counts[name] = requests, failures
            if failures > max_error_rate * requests:
                raise RolledBackError(
                    f"{failures} of {requests} requests to {name!r} failed while {engine!r} was watched "
                    f"(allowed: {max_error_rate:.1%})"
                )
        if (left := deadline - time.monotonic()) <= 0:
            return counts[alias]
        time.sleep(min(left, _WATCH_INTERVAL_S))


@contextlib.contextmanager
def explained(address: str, *, has_key: bool) -> Iterator[None]:
    """Turn what tritonclient raises into this package's errors.

    Args:
        address: The server, for messages.
        has_key: Whether a key for restricted protocols was sent.
    """
    try:
        yield
    except InferenceServerException as exc:
        message = (exc.message() or "").strip()
        if "protocol is restricted" in message:
            name = message.partition("triton-grpc-protocol-")[2].partition("'")[0] or "NAME"
            raise ControlError(
                f"{address} restricts model control and the key {'was refused' if has_key else 'is missing'}: give "
                f"--control-key {name}=VALUE, as the server's --grpc-restricted-protocol has it"
            ) from exc
        raise ControlError(
            f"{address} cannot be controlled ({message or exc.status()}); is `matteserve serve` running there, and is "
            "this its gRPC port?"
        ) from exc


def _becomes_quiet(control: Control, engine: str, quiet_s: float) -> bool:
    before = control.statistics(engine)
    for _ in range(_QUIET_WINDOWS):
        time.sleep(quiet_s)
        now = control.statistics(engine)
        if now == before:
            return True
        before = now
    return False
