"""A page with everything: figures, plots, environment. Self-contained, readable in light and dark, prints well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from matteserve_bench.environment import format_environment
from matteserve_bench.figures import due_in_period
from matteserve_bench.metrics import Summary
from matteserve_bench.records import Run
from matteserve_bench.report import format_verdict
from matteserve_bench.svg import Series, grouped_bars, legend, line_plot, stacked_bars
from matteserve_bench.sweep import find_knee, format_findings, point_of

_SERVER_PARTS = (
    ("queue", "queue"),
    ("compute_input", "compute input"),
    ("compute_infer", "compute infer"),
    ("compute_output", "compute output"),
)
_CDF_POINTS = 200
_MOST_CDFS = 8


def to_html(runs: Sequence[Run], summaries: Sequence[Summary], *, slo_ms: float | None = None) -> str:
    """The page.

    Args:
        runs: What was measured.
        summaries: Of each run.
        slo_ms: Bound of p99, drawn and used for the highest rate.
    """
    titles = [_title(run) for run in runs]
    models = list(dict.fromkeys(titles))
    sections = [
        _cards(runs, summaries),
        _section("Throughput and latency", _throughput_latency(models, titles, summaries, slo_ms), (
            "One point for each load; hollow points are INVALID. Up and to the left of the knee more load buys "
            "throughput, beyond it only latency."
        )),
        _section("Latency", _latency_cdf(runs, summaries, titles), (
            "Share of requests answered within a time, from the moment each was due. Failures never are."
        )),
        _section("Where the time goes", _where_time_goes(runs, summaries, titles), (
            "Means per request. “Client and network” is what the client saw and the server did not count."
        )),
        _section("Batches", _batches(summaries, titles), "Share of executions by batch size, counted by the server."),
        _section("Every run", _table(runs, summaries, titles), ""),
        _section("Environment", _environments(runs), ""),
    ]  # fmt: skip
    findings = format_findings(summaries, slo_ms)
    found = "".join(f"<p class=finding>{escape(line)}</p>" for line in findings.splitlines())
    dates = sorted({str(run.header.get("date", "")) for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    heading = ", ".join(models)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(heading)}: load test</title><style>{_STYLE}</style>"
        f"<main><header><h1>{escape(heading)}</h1><p>matteserve load test, {escape(when)}</p></header>"
        f"{found}{''.join(sections)}</main></html>\n"
    )


def _title(run: Run) -> str:
    """Which line of a plot a run belongs to: model and precision, and what else tells runs apart."""
    model = run.header.get("model", {})
    precision = " ".join(str(model[key]) for key in ("engine", "precision") if model.get(key))
    parts = [run.load.model, f"({precision})" if precision else ""]
    parts += ["shared memory" if run.load.transport == "shm" else "", "pictures" if run.load.what == "images" else ""]
    parts += [f"{run.load.rows} a request" if run.load.rows > 1 else "", run.load.label]
    return " ".join(part for part in parts if part)


def _cards(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    best = max(
        (s for s in summaries if s.verdict.valid), key=lambda s: s.images_per_s, default=None
    ) or max(summaries, key=lambda s: s.images_per_s)  # fmt: skip
    valid = sum(summary.verdict.valid for summary in summaries)
    cards = [
        (f"{best.images_per_s:.4g}", "images/s", f"{best.load.pace}" + ("" if best.verdict.valid else ", INVALID")),
        (_ms(best, "p50"), "ms p50", "at that load"),
        (_ms(best, "p99"), "ms p99", "at that load"),
    ]
    if best.images_per_s_per_gpu is not None:
        cards.append((f"{best.images_per_s_per_gpu:.4g}", "images/s per GPU", "at that load"))
    if best.images_per_joule is not None:
        cards.append((f"{best.images_per_joule:.3g}", "images/J", "GPU energy"))
    if best.roofline is not None:
        cards.append((f"{best.roofline.share:.1%}", "of the roofline", f"peak {best.roofline.peak_tops:g} TOPS"))
    if best.cost_per_1000_images is not None:
        cards.append((f"{best.cost_per_1000_images:.3g}", "per 1,000 images", "at the given price"))
    if best.mean_batch is not None:
        cards.append((f"{best.mean_batch:.2f}", "mean batch", "at that load"))
    cards.append((f"{valid} of {len(summaries)}", "runs VALID", "reasons in the table"))
    return "<div class=cards>" + "".join(
        f"<div><b>{escape(value)}</b> <span>{escape(unit)}</span><small>{escape(note)}</small></div>"
        for value, unit, note in cards
    ) + "</div>"  # fmt: skip


def _throughput_latency(
    models: Sequence[str], titles: Sequence[str], summaries: Sequence[Summary], slo_ms: float | None
) -> str:
    series: list[Series] = []
    for mode, suffix in (("closed", ""), ("open", ", open load")):
        for model in models:
            mine = [
                s for s, title in zip(summaries, titles, strict=True)
                if title == model and s.load.mode == mode and s.latency_ms
            ]  # fmt: skip
            mine.sort(key=lambda s: point_of(s).load)
            if not mine:
                continue
            knee = find_knee([point_of(s) for s in mine]) if mode == "closed" and len(mine) > 2 else None
            series.append(
                Series(
                    model + suffix,
                    [(s.images_per_s, s.latency_ms["p99"]) for s in mine],
                    [
                        f"{point_of(s).load:g}" + (" knee" if knee is not None and point_of(s) == knee else "")
                        for s in mine
                    ],
                    hollow=[not s.verdict.valid for s in mine],
                )
            )
    rule = None if slo_ms is None else (slo_ms, f"bound {slo_ms:g} ms")
    plot = line_plot(series, x_title="images per second", y_title="p99 latency, ms", log_y=True, rule=rule)
    return plot and plot + legend(one.name for one in series)


def _latency_cdf(runs: Sequence[Run], summaries: Sequence[Summary], titles: Sequence[str]) -> str:
    several = len(set(titles)) > 1
    series: list[Series] = []
    for run, summary, title in zip(runs, summaries, titles, strict=True):
        due = due_in_period(run)
        latencies = sorted(record.latency_ms for record in due if not record.error)
        if not latencies or len(series) == _MOST_CDFS:
            continue
        step = max(1, len(latencies) // _CDF_POINTS)
        points = [(latencies[n], (n + 1) / len(due)) for n in range(0, len(latencies), step)]
        points.append((latencies[-1], len(latencies) / len(due)))
        name = f"{title}, {summary.load.pace}" if several else summary.load.pace
        series.append(Series(name, points, markers=False))
    plot = line_plot(series, x_title="latency, ms", y_title="share of requests", log_x=True, y_top=1.0)
    left_out = len(runs) - len(series)
    note = f"<p class=note>{left_out} more runs are left out.</p>" if left_out > 0 and len(series) == _MOST_CDFS else ""
    return plot and plot + legend(one.name for one in series) + note


def _where_time_goes(runs: Sequence[Run], summaries: Sequence[Summary], titles: Sequence[str]) -> str:
    several = len(set(titles)) > 1
    names: list[str] = []
    rows: list[dict[str, float]] = []
    for summary, title in zip(summaries, titles, strict=True):
        if not summary.latency_ms or not summary.server_ms:
            continue
        parts = {label: summary.server_ms[name] for name, label in _SERVER_PARTS}
        stages = dict(summary.stages_ms)
        request = stages.pop("request", summary.latency_ms["mean"])
        parts["client and network"] = max(0.0, request - sum(summary.server_ms.values()))
        if summary.stages_ms:
            parts |= stages
        names.append(f"{title}, {summary.load.pace}" if several else summary.load.pace)
        rows.append(parts)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    parts_of = [(column, [row.get(column, 0.0) for row in rows]) for column in columns]
    plot = stacked_bars(names, parts_of, title="milliseconds per request")
    return plot and plot + legend(columns)


def _batches(summaries: Sequence[Summary], titles: Sequence[str]) -> str:
    several = len(set(titles)) > 1
    counted = [(s, t) for s, t in zip(summaries, titles, strict=True) if s.batches][:_MOST_CDFS]
    sizes = sorted({size for summary, _ in counted for size in summary.batches})
    series: list[tuple[str, list[float]]] = []
    for summary, title in counted:
        total = sum(summary.batches.values())
        shares = [summary.batches.get(size, 0) / total for size in sizes]
        series.append((f"{title}, {summary.load.pace}" if several else summary.load.pace, shares))
    plot = grouped_bars([str(s) for s in sizes], series, x_title="batch size", y_title="share of executions")
    return plot and plot + legend(name for name, _ in series)


def _table(runs: Sequence[Run], summaries: Sequence[Summary], titles: Sequence[str]) -> str:
    columns: tuple[tuple[str, Callable[[Summary], str]], ...] = (
        ("images/s", lambda s: f"{s.images_per_s:.2f}"),
        ("p50 ms", lambda s: _ms(s, "p50")),
        ("p90", lambda s: _ms(s, "p90")),
        ("p99", lambda s: _ms(s, "p99")),
        ("max", lambda s: _ms(s, "max")),
        ("batch", lambda s: _or_dash(s.mean_batch, "{:.2f}")),
        ("client cores", lambda s: _or_dash(s.client_cpu, "{:.2f}")),
        ("server cores", lambda s: _or_dash(s.server_cpu, "{:.2f}")),
        ("server MiB", lambda s: _or_dash(s.server_rss_mib, "{:.0f}")),
        ("GPU", lambda s: _or_dash(s.gpu_utilisation, "{:.0%}")),
        ("W", lambda s: _or_dash(s.power_w, "{:.0f}")),
        ("success", lambda s: f"{s.success:.2%}"),
    )
    shown = [
        (name, cell) for name, cell in columns
        if name not in ("GPU", "W") or any(cell(summary) != "-" for summary in summaries)
    ]  # fmt: skip
    head = "".join(f"<th>{escape(name)}" for name in ("model", "load", *(name for name, _ in shown), "result"))
    rows = []
    for summary, title in zip(summaries, titles, strict=True):
        cells = "".join(f"<td class=number>{escape(cell(summary))}" for _, cell in shown)
        state = "valid" if summary.verdict.valid else "invalid"
        notes = "".join(f"<br><small>{escape(note)}</small>" for note in summary.verdict.notes)
        result = f'<td class="{state}">{escape(format_verdict(summary))}{notes}'
        rows.append(f"<tr><td>{escape(title)}<td>{escape(summary.load.pace)}{cells}{result}")
    return f"<div class=scroll><table><thead><tr>{head}<tbody>{''.join(rows)}</table></div>"


def _environments(runs: Sequence[Run]) -> str:
    items: Iterable[str] = dict.fromkeys(format_environment(run.header) for run in runs if run.header)
    commands: Iterable[str] = dict.fromkeys(str(run.header["command"]) for run in runs if run.header.get("command"))
    return "".join(f"<p>{escape(item)}</p>" for item in items) + "".join(
        f"<pre>{escape(command)}</pre>" for command in commands
    )


def _section(title: str, body: str, about: str) -> str:
    """A section, or nothing if there is nothing to show."""
    if not body:
        return ""
    words = f"<p class=about>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{words}{body}</section>"


def _ms(summary: Summary, name: str) -> str:
    return _or_dash(summary.latency_ms.get(name), "{:.1f}")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


# Colours: Okabe and Ito's, which stay apart for colour-blind readers too; the first two swapped for contrast.
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2128;--soft:#5d6673;--rule:#e3e6ea;--card:#f5f7f9;
--good:#08764f;--bad:#b3261e;--series-0:#0072b2;--series-1:#d55e00;--series-2:#009e73;--series-3:#cc79a7;
--series-4:#e69f00;--series-5:#56b4e9;--series-6:#7f6bd6;--series-7:#8a8f98}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e6e9ed;--soft:#9aa4b1;--rule:#2b3138;--card:#1d2228;
--good:#4cc38a;--bad:#ff8a80;--series-0:#4aa8e0;--series-1:#ff8c42;--series-2:#2fc79a}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1060px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;line-height:1.25;margin:0}h2{font-size:18px;margin:40px 0 4px}
header p,.about,.note,small{color:var(--soft)}header p{margin:4px 0 20px}.about{margin:0 0 10px;max-width:70ch}
.finding{margin:4px 0;font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0}
.cards div{background:var(--card);border-radius:10px;padding:14px 16px}.cards b{font-size:24px;font-weight:650}
.cards span{white-space:nowrap}.cards small{display:block}
svg{width:100%;max-width:820px;height:auto;display:block;font-size:12px}
svg text{fill:var(--ink)}svg .tick,svg .note{fill:var(--soft)}svg .label{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--rule)}.rule{stroke:var(--bad);stroke-dasharray:5 4}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.dot{fill:var(--c);stroke:var(--c);stroke-width:2}.dot.hollow{fill:var(--page)}.bar{fill:var(--c)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0 0;font-size:13px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--c);margin-right:7px;
vertical-align:-1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;min-width:100%}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--rule);vertical-align:top;white-space:nowrap}
th{color:var(--soft);font-weight:600}.number{text-align:right;font-variant-numeric:tabular-nums}
.valid,.invalid{white-space:normal;min-width:240px}.valid{color:var(--good)}.invalid{color:var(--bad)}
pre{background:var(--card);padding:10px 14px;border-radius:8px;overflow-x:auto;font-size:13px}
@media print{main{max-width:none}section{break-inside:avoid}}
"""
