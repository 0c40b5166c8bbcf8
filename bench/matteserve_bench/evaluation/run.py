"""Pictures to the server, alphas to worker processes, scores back: in order, and a bounded number at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from matteserve_bench._errors import EvaluationError
from matteserve_bench.evaluation.masks import load_mask, load_trimap
from matteserve_bench.evaluation.pairs import Pair
from matteserve_bench.evaluation.sheet import Tiles, make_tiles
from matteserve_client import Client, Matte, MatteserveError

DEFAULT_WORKERS = min(4, len(os.sched_getaffinity(0)))

Levels = NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """What one model made of one picture.

    Attributes:
        pair: The picture and its mask.
        model: Who made the alpha.
        size: (height, width) of the alpha; None if there is none.
        figures: Value by `Measure.key`; empty if it failed.
        curves: See `Scores`.
        empty: The mask has no foreground.
        error: Why it failed; None if it did not.
        tiles: Small pictures of mask, alpha and difference, for a contact sheet.
    """

    pair: Pair
    model: str
    size: tuple[int, int] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    empty: bool = False
    error: str | None = None
    tiles: Tiles | None = None


def evaluate(
    client: Client,
    pairs: Sequence[Pair],
    models: Sequence[str],
    *,
    in_flight: int = 8,
    workers: int = DEFAULT_WORKERS,
    hce: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[Row]:
    """Ask every model for every picture, and score what comes back.

    All models work on a picture at about the same time, so whatever ends the run early, pictures are complete. At most
    `in_flight` and a few pictures, and three alphas for each worker and model, are held at once.

    Args:
        client: Connection to the server.
        pairs: Pictures and masks.
        models: Aliases or engines.
        in_flight: Most requests on their way at once, over all models.
        workers: Processes that compute measures.
        hce: See `score`.
        stop: When set, no further picture is begun.

    Yields:
        Rows in the order of `pairs`, and of `models` within each; a picture that fails is a row with an error.

    Raises:
        EvaluationError: A worker was killed.
    """
    # Neither fork, which gRPC does not survive, nor spawn, which would import SciPy and OpenCV once for each worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["matteserve_bench.evaluation.measures"])
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(workers, context, initializer=_leave_interrupts_to_the_parent))
        streams = {}
        for model in models:
            streams[model] = client.remove_many(
                (str(pair.image) for pair in pairs),
                in_flight=max(1, in_flight // len(models)),
                model=model,
                output=_levels,
            )
            # A generator: closing it gives up what is on its way.
            stack.enter_context(contextlib.closing(streams[model]))  # type: ignore[type-var]
        begun: deque[Future[list[Row]]] = deque()
        try:
            for pair in pairs:
                if stop is not None and stop.is_set():
                    break
                answers = {model: _answer(pair, next(stream)) for model, stream in streams.items()}
                begun.append(pool.submit(_score, pair, answers, hce))
                if len(begun) > 2 * workers:
                    yield from begun.popleft().result()
            while begun:
                yield from begun.popleft().result()
        except BrokenProcessPool as exc:
            raise EvaluationError(
                "a process that computes measures was killed, perhaps for lack of memory (about 100 bytes a pixel); "
                f"use fewer than {workers} with --workers"
            ) from exc


def _levels(matte: Matte) -> Levels:
    return np.asarray(matte.alpha_image())


def _answer(pair: Pair, result: Levels | MatteserveError) -> Levels | str:
    if not isinstance(result, MatteserveError):
        return result
    text = str(result)
    return text if str(pair.image) in text else f"{pair.image}: {text}"


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends in its own way


def _score(pair: Pair, answers: Mapping[str, Levels | str], hce: bool) -> list[Row]:
    """Score all models' alphas of one picture; runs in a worker."""
    from matteserve_bench.evaluation.measures import score

    truth: tuple[NDArray[np.float32], NDArray[np.bool_] | None] | str
    try:
        truth = load_mask(pair.mask), None if pair.trimap is None else load_trimap(pair.trimap)
    except EvaluationError as exc:
        truth = str(exc)
    rows = []
    for model, answer in answers.items():
        if isinstance(answer, str):
            rows.append(Row(pair, model, error=answer))
            continue
        height, width = answer.shape
        size = height, width
        error = truth if isinstance(truth, str) else _misfit(pair, size, *truth)
        if isinstance(truth, str) or error is not None:
            rows.append(Row(pair, model, size, error=error))
            continue
        mask, unknown = truth
        scores = score(answer, mask, unknown=unknown, hce=hce)
        tiles = make_tiles(answer, mask)
        rows.append(Row(pair, model, size, scores.figures, scores.curves, scores.empty, tiles=tiles))
    return rows


def _misfit(
    pair: Pair, size: tuple[int, int], mask: NDArray[np.float32], unknown: NDArray[np.bool_] | None
) -> str | None:
    for path, array in ((pair.mask, mask), (pair.trimap, unknown)):
        if array is not None and array.shape != size:
            turned = " (the picture is turned by its EXIF orientation?)" if array.shape == size[::-1] else ""
            return (
                f"{path} is {array.shape[0]} x {array.shape[1]} and its picture {pair.image} is {size[0]} x {size[1]}, "
                f"height x width, upright{turned}; they must have one size"
            )
    return None
