"""Reports from records: text for people, JSON and CSV for programs. The HTML page is in `html`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matteserve_bench.environment import format_environment
from matteserve_bench.figures import PERCENTILES
from matteserve_bench.metrics import Summary
from matteserve_bench.records import WINDOWS, Run

_LATENCIES = ("min", "mean", *(f"p{percent}" for percent in PERCENTILES), "max")
_SERVER = ("queue", "compute_input", "compute_infer", "compute_output")


def format_text(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    """One run in full, or a table of several; the environments below."""
    if len(summaries) == 1:
        body = format_summary(summaries[0])
        if loadgen := runs[0].extra.get("loadgen"):
            body += "\n" + _row("LoadGen", "[its own words]", "") + "".join(
                f"\n  {name}: {value}" for name, value in loadgen.items()
            )  # fmt: skip
    else:
        body = format_table(summaries)
    environments = list(dict.fromkeys(format_environment(run.header) for run in runs if run.header))
    return "\n".join([body, *(_row("Environment", "", environment) for environment in environments)])


def format_summary(summary: Summary) -> str:
    """One run, in vegeta's form."""
    per_gpu = "-" if summary.images_per_s_per_gpu is None else f"{summary.images_per_s_per_gpu:.2f}/s"
    latency = [f"{summary.latency_ms.get(name, math.nan):.2f}" for name in _LATENCIES]
    errors = ", ".join(f"{kind} {count}" for kind, count in summary.errors.items()) or "none"
    load = summary.load
    lines = [
        _row("Load", "", f"{load.model}, {load.pace}, {load.what} over {load.transport}"
             + (f", {load.rows} images a request" if load.rows > 1 else "")
             + (f", {load.label}" if load.label else "")),
        _row("Images", "[total, rate, throughput, per GPU]",
             f"{summary.images}, {summary.rate:.2f}/s, {summary.images_per_s:.2f}/s, {per_gpu}"),
        _row("Latency ms", "[min, mean, 50, 90, 95, 99, max]", ", ".join(latency)),
    ]  # fmt: skip
    if summary.server_ms:
        server = ", ".join(f"{summary.server_ms[name]:.2f}" for name in _SERVER)
        batch = "" if summary.mean_batch is None else f"   mean batch {summary.mean_batch:.2f}"
        lines.append(_row("Server ms", "[queue, compute in, infer, out]", server + batch))
    if summary.batches:
        sizes = ", ".join(f"{size}: {count}" for size, count in sorted(summary.batches.items()))
        lines.append(_row("Batches", "[size: executions]", sizes))
    if summary.stages_ms:
        names = ", ".join(summary.stages_ms)
        lines.append(_row("Picture ms", f"[{names}]", ", ".join(f"{ms:.2f}" for ms in summary.stages_ms.values())))
    if summary.client_cpu is not None:
        server_cpu = "elsewhere" if summary.server_cpu is None else f"{summary.server_cpu:.2f} cores"
        memory = "" if summary.server_rss_mib is None else f", {summary.server_rss_mib:.0f} MiB"
        lines.append(_row("CPU", "[client, server]", f"{summary.client_cpu:.2f} cores, {server_cpu}{memory}"))
    if summary.gpu_memory_mib is not None or summary.power_w is not None:
        lines.append(_row("GPU", "[utilisation, memory, power]", ", ".join([
            _maybe(summary.gpu_utilisation, "{:.0%}"), _maybe(summary.gpu_memory_mib, "{:.0f} MiB"),
            _maybe(summary.power_w, "{:.0f} W"),
        ])))  # fmt: skip
    derived = _derived(summary)
    if derived:
        lines.append(_row("Derived", "", ", ".join(derived)))
    lines.append(_row("Success", "[ratio]", f"{summary.success:.2%}   Errors: {errors}"))
    lines.append(_row("Result", "", format_verdict(summary)))
    lines += [_row("Note", "", note) for note in summary.verdict.notes]
    return "\n".join(lines)


def format_verdict(summary: Summary) -> str:
    """VALID or INVALID, and why."""
    verdict = summary.verdict
    if not verdict.valid:
        return f"INVALID ({'; '.join(verdict.reasons)})"
    facts = []
    if verdict.deviation is not None:
        facts.append(f"{WINDOWS} windows within {summary.load.stability:.0%}, the worst {verdict.deviation:.1%} off")
    if summary.client_cpu is not None:
        facts.append(f"client {summary.client_cpu:.0%} of a core")
    return f"VALID ({'; '.join(facts)})" if facts else "VALID"


def format_table(summaries: Sequence[Summary]) -> str:
    """One line for each run; reasons and notes below, by the number of the line."""
    names = dict.fromkeys(summary.load.model for summary in summaries)
    width = max(len(_pace(summary, len(names) > 1)) for summary in summaries)
    head = (
        f"{'':>3} {'load':<{width}} {'images/s':>9} {'p50':>8} {'p90':>8} {'p95':>8} {'p99':>8} {'max':>8}"
        f" {'queue':>8} {'infer':>8} {'batch':>6} {'client':>7} {'server':>7} {'success':>8}  result"
    )
    above = f"{'':>3} {'':<{width}} {'':>9} {'latency ms':<44} {'server ms':<17} {'':>6} {'CPU cores':>15}"
    lines = [above, head]
    below: list[str] = []
    for number, summary in enumerate(summaries, 1):
        latency = " ".join(f"{summary.latency_ms.get(n, math.nan):8.1f}" for n in ("p50", "p90", "p95", "p99", "max"))
        server = " ".join(f"{summary.server_ms.get(name, math.nan):8.1f}" for name in ("queue", "compute_infer"))
        lines.append(
            f"{number:>3} {_pace(summary, len(names) > 1):<{width}} {summary.images_per_s:9.2f} {latency} {server}"
            f" {_maybe(summary.mean_batch, '{:.2f}'):>6} {_maybe(summary.client_cpu, '{:.2f}'):>7}"
            f" {_maybe(summary.server_cpu, '{:.2f}'):>7} {summary.success:8.2%}"
            f"  {'VALID' if summary.verdict.valid else 'INVALID'}"
        )
        below += [f"{number:>3} INVALID: {reason}" for reason in summary.verdict.reasons]
        below += [f"{number:>3} note: {note}" for note in summary.verdict.notes]
        if derived := _derived(summary):
            below.append(f"{number:>3} {', '.join(derived)}")
        if summary.errors:
            below.append(f"{number:>3} errors: " + ", ".join(f"{k} {count}" for k, count in summary.errors.items()))
    return "\n".join(lines + below)


def to_json(runs: Sequence[Run], summaries: Sequence[Summary]) -> dict[str, Any]:
    """The same figures as objects: the environments, and a result for each run that points to its one by number."""
    environments: list[Any] = []
    results = []
    for run, summary in zip(runs, summaries, strict=True):
        if run.header not in environments:
            environments.append(run.header)
        values = finite(asdict(summary))
        load = values.pop("load")
        results.append({"environment": environments.index(run.header), **load, **values, "extra": dict(run.extra)})
    return {"environments": environments, "results": results}


def to_csv(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    """One line for each run, with the environment in columns."""
    rows = []
    for run, summary in zip(runs, summaries, strict=True):
        model, server, client = (run.header.get(key, {}) for key in ("model", "server", "client"))
        load = summary.load
        rows.append({
            "date": run.header.get("date"), "git": run.header.get("git"), "model": load.model,
            "engine": model.get("engine"), "precision": model.get("precision"), "height": model.get("height"),
            "width": model.get("width"), "triton": server.get("triton"), "cpu": client.get("cpu"),
            "gpu": ", ".join(gpu["name"] for gpu in server.get("gpus", [])), "mode": load.mode, "pace": load.pace,
            "concurrency": load.concurrency, "rate": load.rate, "what": load.what, "transport": load.transport,
            "rows": load.rows, "requests": summary.requests, "images_per_s": summary.images_per_s,
            "images_per_s_per_gpu": summary.images_per_s_per_gpu,
            **{f"latency_{name}_ms": summary.latency_ms.get(name) for name in _LATENCIES},
            **{f"server_{name}_ms": summary.server_ms.get(name) for name in _SERVER},
            "mean_batch": summary.mean_batch, "client_cpu": summary.client_cpu, "server_cpu": summary.server_cpu,
            "server_rss_mib": summary.server_rss_mib, "gpu_utilisation": summary.gpu_utilisation,
            "gpu_memory_mib": summary.gpu_memory_mib, "power_w": summary.power_w,
            "images_per_joule": summary.images_per_joule,
            "roofline_share": None if summary.roofline is None else summary.roofline.share,
            "cost_per_1000_images": summary.cost_per_1000_images, "success": summary.success,
            "valid": summary.verdict.valid, "reasons": "; ".join(summary.verdict.reasons),
        })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def _derived(summary: Summary) -> list[str]:
    derived = []
    if summary.images_per_joule is not None:
        derived.append(f"{summary.images_per_joule:.3g} images/J")
    if summary.roofline is not None:
        roofline = summary.roofline
        derived.append(
            f"{roofline.share:.1%} of the roofline ({roofline.gmac_per_image:.4g} GMAC an image, "
            f"peak {roofline.peak_tops:g} TOPS: {roofline.source})"
        )
    if summary.cost_per_1000_images is not None:
        derived.append(f"{summary.cost_per_1000_images:.3g} per 1,000 images at the given price")
    return derived


def _pace(summary: Summary, with_model: bool) -> str:
    load = summary.load
    parts = [load.model] if with_model else []
    parts.append(load.pace)
    parts += [load.label] if load.label else []
    return " ".join(parts)


def _row(name: str, unit: str, values: str) -> str:
    return f"{name:<13} {unit:<36} {values}" if unit or len(values) < 80 else f"{name:<13} {values}"


def _maybe(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
