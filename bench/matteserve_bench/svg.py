"""Plots as SVG text: lines, steps, stacked bars. Nothing is loaded, nothing runs; colours come from CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 26, 16, 46
SERIES_COLOURS = 8
"""Colours that the page defines as --series-0 ... ; after that they repeat."""


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: For the legend.
        points: (x, y) in order.
        labels: Text beside each point; empty for none.
        markers: Draw a dot at each point.
        hollow: For each point, whether its dot is hollow; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    markers: bool = True
    hollow: Sequence[bool] = ()


def line_plot(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    log_x: bool = False,
    log_y: bool = False,
    y_top: float | None = None,
    rule: tuple[float, str] | None = None,
) -> str:
    """Lines over two axes.

    Args:
        series: What to draw.
        x_title: With its unit.
        y_title: With its unit.
        log_x: Logarithmic axis; values at or below 0 are left out.
        log_y: The same for y.
        y_top: Upper end of y; None takes the largest value.
        rule: A horizontal line at a value, and its text.
    """
    drawn = [
        (index, one, [(x, y, n) for n, (x, y) in enumerate(one.points) if _drawable(x, log_x) and _drawable(y, log_y)])
        for index, one in enumerate(series)
    ]
    xs = [x for _, _, points in drawn for x, _, _ in points]
    ys = [y for _, _, points in drawn for _, y, _ in points] + ([rule[0]] if rule else [])
    if not xs:
        return ""
    x_axis = _Axis.over(xs, log_x, _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.over([*ys, *([y_top] if y_top else [])], log_y, HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(x_axis, y_axis, x_title, y_title)]
    if rule is not None:
        y = y_axis.at(rule[0])
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="note" x="{WIDTH - _RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">{escape(rule[1])}</text>'
        )
    labelled: list[tuple[float, float]] = []  # a label that would lie on another is left out
    for index, one, points in drawn:
        style = f"--c:var(--series-{index % SERIES_COLOURS})"
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y, _ in points)
        parts.append(f'<polyline class="line" style="{style}" points="{path}"/>')
        for x, y, number in points:
            at_x, at_y = x_axis.at(x), y_axis.at(y)
            label = one.labels[number] if one.labels else ""
            if one.markers:
                hollow = " hollow" if one.hollow and one.hollow[number] else ""
                title = escape(f"{one.name} {label}: {x:.4g}, {y:.4g}")
                parts.append(
                    f'<circle class="dot{hollow}" style="{style}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4">'
                    f"<title>{title}</title></circle>"
                )
            if label and all(abs(at_x - x0) > 34 or abs(at_y - y0) > 14 for x0, y0 in labelled):
                labelled.append((at_x, at_y))
                anchor, shift = ("end", -8) if at_x > WIDTH * 0.8 else ("start", 8)
                parts.append(
                    f'<text class="label" x="{at_x + shift:.1f}" y="{at_y - 7:.1f}" text-anchor="{anchor}">'
                    f"{escape(label)}</text>"
                )
    return _svg(parts, f"{y_title} over {x_title}")


def stacked_bars(names: Sequence[str], parts_of: Sequence[tuple[str, Sequence[float]]], *, title: str) -> str:
    """Horizontal bars, one for each name, made of parts.

    Args:
        names: Of the bars.
        parts_of: For each part its name and its value in every bar.
        title: Of the axis, with its unit.
    """
    totals = [sum(values[n] for _, values in parts_of) for n in range(len(names))]
    if not totals or not max(totals) > 0:
        return ""
    left = 20 + min(WIDTH // 2, 7 * max(len(name) for name in names))
    axis = _Axis.over([0.0, *totals], False, left, WIDTH - 64)
    row = 28
    height = row * len(names) + 44
    out = []
    for tick in axis.ticks():
        x = axis.at(tick)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 38}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{height - 22}" text-anchor="middle">{_number(tick)}</text>')
    middle = (left + WIDTH - 64) / 2
    out.append(f'<text class="axis" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{escape(title)}</text>')
    for n, name in enumerate(names):
        y, at = 8 + row * n, 0.0
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for index, (part, values) in enumerate(parts_of):
            x, width = axis.at(at), axis.at(at + values[n]) - axis.at(at)
            at += values[n]
            out.append(
                f'<rect style="--c:var(--series-{index % SERIES_COLOURS})" class="bar" x="{x:.1f}" y="{y}" '
                f'width="{max(0.0, width):.1f}" height="{row - 9}">'
                f"<title>{escape(part)}: {values[n]:.2f}</title></rect>"
            )
        out.append(f'<text class="label" x="{axis.at(at) + 6:.1f}" y="{y + 14}">{_number(totals[n])}</text>')
    return _svg(out, title, height)


def grouped_bars(
    categories: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x_title: str, y_title: str
) -> str:
    """Vertical bars, side by side in each category.

    Args:
        categories: Along the axis.
        series: For each its name and its value in every category.
        x_title: Of the axis of categories.
        y_title: With its unit.
    """
    values = [value for _, one in series for value in one]
    if not categories or not values or not max(values) > 0:
        return ""
    y_axis = _Axis.over([0.0, *values], False, HEIGHT - _BOTTOM, _TOP)
    span = (WIDTH - _LEFT - _RIGHT) / len(categories)
    width = span * 0.8 / len(series)
    out = [*_frame(None, y_axis, x_title, y_title)]
    for n, category in enumerate(categories):
        start = _LEFT + span * (n + 0.1)
        out.append(
            f'<text class="tick" x="{start + span * 0.4:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{escape(category)}</text>"
        )
        for index, (name, one) in enumerate(series):
            top = y_axis.at(one[n])
            out.append(
                f'<rect class="bar" style="--c:var(--series-{index % SERIES_COLOURS})" x="{start + index * width:.1f}" '
                f'y="{top:.1f}" width="{max(1.0, width - 1):.1f}" height="{HEIGHT - _BOTTOM - top:.1f}">'
                f"<title>{escape(name)}, {escape(category)}: {one[n]:.4g}</title></rect>"
            )
    return _svg(out, f"{y_title} by {x_title}")


def legend(names: Iterable[str]) -> str:
    """The names of series beside their colours, as HTML."""
    items = "".join(
        f'<li><i style="--c:var(--series-{index % SERIES_COLOURS})"></i>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], log: bool, start: float, end: float) -> _Axis:
        if log:
            rounds = [factor * 10.0**decade for decade in range(-6, 10) for factor in (1, 2, 5)]
            low = max(tick for tick in rounds if tick <= min(values) * (1 + 1e-9))
            high = min(tick for tick in rounds if tick >= max(values) * (1 - 1e-9) and tick > low)
            return cls(low, high, True, start, end)
        step = _step(max(values) or 1.0)
        return cls(0.0, step * math.ceil((max(values) or 1.0) / step - 1e-9), False, start, end)

    def at(self, value: float) -> float:
        if self.log:
            share = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            step = _step(self.high)
            return [n * step for n in range(round(self.high / step) + 1)]
        factors = (1, 2, 5) if self.high / self.low <= 1000 else (1,)
        ticks = (factor * 10.0**decade for decade in range(-6, 10) for factor in factors)
        return [tick for tick in ticks if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def _frame(x_axis: _Axis | None, y_axis: _Axis, x_title: str, y_title: str) -> Iterable[str]:
    floor = HEIGHT - _BOTTOM
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
    for tick in x_axis.ticks() if x_axis is not None else ():
        x = x_axis.at(tick) if x_axis is not None else 0.0
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{_number(tick)}</text>'
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    yield f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    centre = (_TOP + floor) / 2
    yield (
        f'<text class="axis" transform="translate(14 {centre:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )


def _svg(parts: Iterable[str], title: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _step(top: float) -> float:
    """A round distance of ticks that makes about five of them."""
    magnitude: float = 10.0 ** math.floor(math.log10(top / 5))
    return next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if top / (magnitude * factor) <= 5.5)


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)
