"""What a figure was measured on; no figure is quoted without it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from matteserve_bench.processes import find_listener, libraries_of, tree_of
from matteserve_bench.triton import TritonServer
from matteserve_client import ModelContract, __version__


def describe_environment(server: TritonServer, model: str, contract: ModelContract) -> dict[str, Any]:
    """The header of a file of records: date, command, this machine, the server, the model and its batching.

    What only the server's machine knows (its GPU, what it has loaded, the model's manifest) is there if the server
    runs on this machine.
    """
    engine = server.engine_of(model)
    listener = find_listener(server.address)
    described: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": " ".join(["matteserve", *sys.argv[1:]]),
        "git": _git_revision(),
        "matteserve": __version__,
        "client": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "server": {"address": server.address, "triton": server.version(), "local": listener is not None},
        "model": {
            "name": model,
            "engine_name": engine,
            "architecture": contract.architecture,
            "weights": contract.weights,
            "engine": contract.engine,
            "precision": contract.precision,
            "height": contract.height,
            "width": contract.width,
            **describe_batching(server.config(engine)),
        },
    }
    if listener is not None:
        described["server"] |= {"software": libraries_of(listener), "processes": len(tree_of(listener))}
        if gpus := local_gpus():
            described["server"]["gpus"] = gpus
        if (manifest := _manifest_of(listener.cmdline(), engine)) is not None:
            described["model"]["manifest"] = manifest
    return described


def describe_batching(config: Any) -> dict[str, Any]:
    """What `config.pbtxt` says about batching and instances."""
    batcher = config.dynamic_batching
    groups = [
        {"kind": model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind), "count": group.count}
        for group in config.instance_group
    ]
    dynamic = None
    if config.HasField("dynamic_batching"):
        dynamic = {
            "max_queue_delay_microseconds": batcher.max_queue_delay_microseconds,
            "preferred_batch_size": list(batcher.preferred_batch_size),
            "max_queue_size": batcher.default_queue_policy.max_queue_size,
        }
    return {"max_batch_size": config.max_batch_size, "dynamic_batching": dynamic, "instance_group": groups}


def cpu_model() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def local_gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs of this machine with driver and power limit, as `nvidia-smi` names them; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    names = ("name", "driver_version", "memory.total", "power.limit")
    command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(names, (value.strip() for value in line.split(",")), strict=False))
        for line in done.stdout.splitlines()
        if line.strip()
    ]


def format_environment(header: dict[str, Any] | Any) -> str:
    """One paragraph for people."""
    model, server, client = header.get("model", {}), header.get("server", {}), header.get("client", {})
    batching = model.get("dynamic_batching")
    gpus = server.get("gpus", [])
    parts = [
        *(f"{gpu['name']}, driver {gpu['driver_version']}" for gpu in gpus),
        f"{client.get('cpu')}, {client.get('cores')} cores, kernel {client.get('kernel')}",
        "client and server on one machine" if server.get("local") else f"server at {server.get('address')}",
        f"Triton {server.get('triton')}",
        *(f"{name} {version}" for name, version in server.get("software", {}).items()),
        f"{model.get('name')} -> {model.get('engine_name')}"
        if model.get("name") != model.get("engine_name")
        else str(model.get("name")),
        f"{model.get('architecture')} {model.get('engine')} {model.get('precision')}, "
        f"{model.get('height')}x{model.get('width')}",
        f"batch <= {model.get('max_batch_size')}, "
        + (f"batcher delay {batching['max_queue_delay_microseconds']} us" if batching else "no dynamic batching"),
        "instances "
        + (
            ", ".join(
                f"{group['count']} {group['kind'].removeprefix('KIND_')}" for group in model.get("instance_group", [])
            )
            or "default"
        ),
        f"matteserve {header.get('matteserve')}" + (f" ({header['git']})" if header.get("git") else ""),
        f"Python {client.get('python')}",
        str(header.get("date")),
    ]
    return "; ".join(parts)


def _git_revision() -> str | None:
    """Revision of the source tree that this package runs from, "+" if it has changes; None for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or (git := shutil.which("git")) is None:
        return None
    try:
        revision = subprocess.run(
            [git, "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
        changes = subprocess.run(
            [git, "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changes else "")


def _manifest_of(command_line: list[str], engine: str) -> dict[str, Any] | None:
    """The parts of an engine's manifest that a figure depends on, found through the server's command line."""
    roots = [Path(a.partition("=")[2]) for a in command_line if a.startswith(("--model-repository=", "--model-store="))]
    for root in roots:
        for path in sorted(root.glob(f"{engine}/*/manifest.json")):
            try:
                manifest = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            wanted = ("onnx", "plan", "producer", "compute_capability", "profile", "giga_macs")
            return {key: manifest[key] for key in wanted if key in manifest}
    return None
