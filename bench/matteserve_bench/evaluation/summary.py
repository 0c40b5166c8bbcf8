"""From rows to figures: means over pictures, differences between models, and how far these are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matteserve_bench._errors import EvaluationError
from matteserve_bench.evaluation.measures import MEASURES, Measure
from matteserve_bench.evaluation.run import Row

FEWEST_PICTURES = 20
"""Pictures below which an interval is too good to be true."""
_RESAMPLES = 2_000
_AT_ONCE = 100  # resamples; bounds memory

_RESULT_BY_BETTER = {True: "better", False: "worse"}


@dataclass(frozen=True)
class Difference:
    """How a model differs from the first one, over the same pictures.

    Attributes:
        model: Which.
        baseline: The first one.
        measure: Key of what is compared.
        difference: model - baseline.
        low: Lower end of the 95 % interval.
        high: Upper end.
        verdict: "better", "worse" or "within the noise" (the interval holds 0); "equal" where every picture is.
    """

    model: str
    baseline: str
    measure: str
    difference: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Summary:
    """What all pictures say together.

    Attributes:
        models: In the order in which they were named; differences are from the first.
        measures: What was computed.
        pictures: Pictures that every model answered; only these count.
        left_out: Pictures for which a model failed.
        empty_masks: How many of the pictures have no foreground, where the field's F and IoU are 0 by definition.
        figures: Value by model and `Measure.key`.
        differences: One for each further model and measure.
        errors: (model, picture, reason), as far as there are any.
    """

    models: tuple[str, ...]
    measures: tuple[Measure, ...]
    pictures: int
    left_out: int
    empty_masks: int
    figures: Mapping[str, Mapping[str, float]]
    differences: tuple[Difference, ...]
    errors: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return {
            "pictures": self.pictures,
            "left_out": self.left_out,
            "empty_masks": self.empty_masks,
            "measures": {model: dict(figures) for model, figures in self.figures.items()},
            "differences": [vars(difference) for difference in self.differences],
            "errors": [{"model": m, "image": image, "error": text} for m, image, text in self.errors],
        }


def summarise(rows: Iterable[Row], models: Sequence[str]) -> Summary:
    """Sum up what was scored.

    Args:
        rows: Any number, tiles not needed.
        models: The first is the baseline.

    Raises:
        EvaluationError: There is no picture that every model answered.
    """
    rows = list(rows)
    errors = tuple((row.model, row.pair.name, row.error) for row in rows if row.error is not None)
    scored = Counter(row.pair for row in rows if row.error is None)
    complete = [pair for pair, count in scored.items() if count == len(models)]
    if not complete:
        first = f"; the first error: {errors[0][2]}" if errors else ""
        raise EvaluationError(f"no picture was scored for {' and '.join(models)}{first}")
    by_key = {(row.model, row.pair): row for row in rows}
    chosen = {model: [by_key[model, pair] for pair in complete] for model in models}
    first_row = chosen[models[0]][0]
    measures = tuple(measure for measure in MEASURES if measure.key in first_row.figures)
    values = {(model, m.key): _values(chosen[model], m) for model in models for m in measures}
    everything = np.full((1, len(complete)), 1 / len(complete))
    figures = {
        model: {m.key: float(_statistic(everything, values[model, m.key])[0]) for m in measures} for model in models
    }
    differences = [
        _difference(model, models[0], m, values[model, m.key], values[models[0], m.key])
        for model in models[1:]
        for m in measures
    ]
    return Summary(
        tuple(models),
        measures,
        len(complete),
        len({row.pair for row in rows}) - len(complete),
        sum(row.empty for row in chosen[models[0]]),
        figures,
        tuple(differences),
        errors,
    )


def bootstrap_difference(
    a: NDArray[np.float64], b: NDArray[np.float64], *, seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float, float]:
    """(difference, low, high) of b - a, with a 95 % percentile interval over resampled pictures.

    The pictures are drawn for both sides together, so what makes a picture hard for both cancels out.

    Args:
        a: Values of one side, shape (N,) for their mean or (N, 256) for the maximum of their mean curve.
        b: Values of the other, for the same pictures.
        seed: Of the resampling.
        resamples: How many.
    """
    count = len(a)
    rng = np.random.default_rng(seed)
    drawn = []
    for first in range(0, resamples, _AT_ONCE):
        how_often = rng.multinomial(count, np.full(count, 1 / count), min(_AT_ONCE, resamples - first))
        weights = how_often / count
        drawn.append(_statistic(weights, b) - _statistic(weights, a))
    whole = np.full((1, count), 1 / count)
    centre = float((_statistic(whole, b) - _statistic(whole, a))[0])
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return centre, float(low), float(high)


def format_summary(summary: Summary) -> str:
    """For people: measures by model, then how each further model differs from the first."""
    first, *others = summary.models
    table = [["", *summary.models]]
    for m in summary.measures:
        figures = [f"{summary.figures[model][m.key]:.{m.digits}f}" for model in summary.models]
        table.append([f"{m.symbol} {'↑' if m.higher_is_better else '↓'}", *figures])
    lines = [*_aligned(table), f"{summary.pictures} pictures"]
    for model in others:
        table = [["", "difference", "95 % interval", ""]]
        for m, d in zip(summary.measures, (d for d in summary.differences if d.model == model), strict=True):
            table.append([m.symbol, f"{d.difference:+.2g}", f"{d.low:+.2g} to {d.high:+.2g}", d.verdict])
        lines += ["", f"{model} against {first}", *_aligned(table)]
    if summary.left_out:
        lines.append(f"Note: {summary.left_out} pictures failed for a model and are left out for all.")
    if summary.empty_masks:
        lines.append(
            f"Note: {summary.empty_masks} masks are empty: F, weighted F, IoU and BIoU are 0 there, whatever alpha is."
        )
    if others and summary.pictures < FEWEST_PICTURES:
        lines.append(f"Note: {summary.pictures} pictures are few, {FEWEST_PICTURES} make an interval believable.")
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns without a head to the left, those with one to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = zip(table[0], line, widths, strict=True)
        yield "  ".join(cell.rjust(width) if head else cell.ljust(width) for head, cell, width in cells).rstrip()


def _values(rows: Sequence[Row], measure: Measure) -> NDArray[np.float64]:
    if measure.curve is not None:
        return np.stack([row.curves[measure.curve] for row in rows])
    return np.array([row.figures[measure.key] for row in rows])


def _statistic(weights: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean, or maximum of the weighted mean curve, for each row of `weights`, (R, N)."""
    means: NDArray[np.float64] = weights @ values
    return means if means.ndim == 1 else means.max(axis=1)


def _difference(
    model: str, baseline: str, measure: Measure, ours: NDArray[np.float64], theirs: NDArray[np.float64]
) -> Difference:
    difference, low, high = bootstrap_difference(theirs, ours)
    if np.array_equal(ours, theirs):
        verdict = "equal"
    elif low <= 0 <= high:
        verdict = "within the noise"
    else:
        verdict = _RESULT_BY_BETTER[(difference > 0) == measure.higher_is_better]
    return Difference(model, baseline, measure.key, difference, low, high, verdict)
