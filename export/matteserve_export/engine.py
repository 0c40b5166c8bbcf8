"""Stage serving ONNX → plan: TensorRT's compiler and that of TensorRT for RTX, through one module.

The two packages have the same Python API but for a few switches, so the difference is the module that is imported and
what stands in `_Kind`:

- ``trt``, package `tensorrt` (10.12 or newer, 11): compiles on the GPU that will run the plan. Plans are bound to that
  TensorRT and that GPU, unless version or hardware compatibility is asked for. Triton's own backend loads them.
- ``rtx``, package `tensorrt_rtx`: compiles ahead of time, without a GPU, for a list of compute capabilities. Its plans
  are not TensorRT plans; Triton needs a Python-based backend for them.

Networks are strongly typed: precision is what the ONNX says (see `precision.py`), the compiler only follows. What the
parser made of the ONNX is judged before anything is compiled (see `network.py`).

Polygraphy (0.53.6) was tried for this. It does build RTX plans, but which of the two packages it uses is one switch for
the process, read when it is imported; it knows the name `tensorrt_rtx` only, which the wheels do not install; and its
errors are text from its logger, without the nodes that the parser objected to. What would be left of this module with
it (the checks, the errors) is most of the module.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from matteserve_client import INPUT_NAME
from matteserve_export._errors import EngineBuildError
from matteserve_export._gpu import Gpu, find_gpu
from matteserve_export.network import NetworkSummary, check_network

__all__ = [
    "CompilerOptions",
    "EngineConfig",
    "HardwareCompatibility",
    "Plan",
    "PlanEngine",
    "Progress",
    "build_plan",
    "check_machine",
    "load_module",
    "parse_network",
]

_LOG = logging.getLogger(__name__)

PlanEngine = Literal["trt", "rtx"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, the steps done and the steps in all."""


@dataclass(frozen=True)
class _Kind:
    """How a package differs from the other."""

    modules: tuple[str, ...]  # the first that can be imported
    title: str
    install: str
    oldest: tuple[int, int]
    needs_gpu: bool
    targets: bool  # takes compute capabilities, in place of the GPU at hand and its compatibility levels


_KINDS: Mapping[str, _Kind] = {
    "trt": _Kind(
        modules=("tensorrt",),
        title="TensorRT",
        install="pip install 'matteserve[gpu]' (its libraries come from NVIDIA's own package index, which the package "
        "tensorrt asks by itself), or build inside NVIDIA's Triton container of the version that will serve the plan",
        oldest=(10, 12),
        needs_gpu=True,
        targets=False,
    ),
    "rtx": _Kind(
        # The wheel with the bindings installs the second name only; the first comes with NVIDIA's meta package.
        modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        title="TensorRT for RTX",
        install="pip install 'matteserve[rtx]'",
        oldest=(1, 4),
        needs_gpu=False,
        targets=True,
    ),
}

_PORTABLE_FROM = (8, 0)  # Turing costs the others speed, so NVIDIA leaves it out of portable engines, too


@dataclass(frozen=True)
class CompilerOptions:
    """How to compile; the defaults fit most.

    Attributes:
        compute_capabilities: GPUs that the plan is for, as "8.9". RTX only; none means every one from 8.0 on that the
            compiler knows, in one plan.
        tf32: Let float32 products round their inputs to 10 bits. Off, so that fp32 means fp32.
        timing_cache: File with timings of earlier builds on this GPU; made, or added to. TensorRT only.
        version_compatible: Let newer TensorRT load the plan. It may be slower, and Triton must be told
            (`--backend-config=tensorrt,version-compatible=true`), because the plan then carries code. TensorRT only.
        hardware_compatibility: Let other GPUs load the plan, at the price of speed. TensorRT only.
        optimization_level: 0 (fast build) to 5 (fast plan); None leaves the compiler's own.
    """

    compute_capabilities: tuple[str, ...] = ()
    tf32: bool = False
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise EngineBuildError(f"compute capability {capability!r} is not one; write it as 8.9")
        if self.hardware_compatibility not in get_args(HardwareCompatibility):
            raise EngineBuildError(
                f"hardware compatibility {self.hardware_compatibility!r} does not exist; allowed are "
                f"{', '.join(get_args(HardwareCompatibility))}"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineBuildError(f"optimization level is {self.optimization_level}; allowed are 0 to 5")


@dataclass(frozen=True)
class EngineConfig:
    """One plan.

    Attributes:
        engine: "trt" or "rtx".
        precision: What the network must be in: "fp32", "fp16", "bf16" or "int8".
        opt_batch_size: The batch that kernels are chosen for; what the dynamic batcher aims at.
        max_batch_size: Largest batch.
        options: How to compile.
    """

    engine: PlanEngine
    precision: str = "fp32"
    opt_batch_size: int = 4
    max_batch_size: int = 8
    options: CompilerOptions = field(default_factory=CompilerOptions)

    def __post_init__(self) -> None:
        if self.engine not in _KINDS:
            raise EngineBuildError(f"there is no plan of engine kind {self.engine!r}; allowed are {', '.join(_KINDS)}")
        if not 1 <= self.opt_batch_size <= self.max_batch_size:
            raise EngineBuildError(
                f"profile: batch sizes are min 1, opt {self.opt_batch_size}, max {self.max_batch_size}; they "
                "must ascend"
            )
        options = self.options
        if _KINDS[self.engine].targets:
            for name in ("timing_cache", "version_compatible"):
                if getattr(options, name):
                    raise EngineBuildError(f"{name}: TensorRT for RTX has no such thing; it is for engine kind trt")
            if options.hardware_compatibility != "none":
                raise EngineBuildError(
                    "hardware_compatibility is for engine kind trt; an rtx plan names its GPUs by compute capability"
                )
        elif options.compute_capabilities:
            raise EngineBuildError(
                "compute capabilities are for engine kind rtx; TensorRT compiles for the GPU at hand, see "
                "hardware_compatibility"
            )


@dataclass(frozen=True)
class Plan:
    """A plan on disk.

    Attributes:
        path: File.
        size: Bytes.
        builder: What the manifest says about how it was compiled.
        network: What the parser made of the ONNX.
        hazards: Known wrong results of this compiler that this network could meet.
    """

    path: Path
    size: int
    builder: Mapping[str, Any]
    network: NetworkSummary
    hazards: tuple[str, ...] = field(default=())


def build_plan(onnx_path: Path, plan_path: Path, config: EngineConfig, progress: Progress | None = None) -> Plan:
    """Compile a serving ONNX.

    Args:
        onnx_path: Serving ONNX, in the precision that is wanted, without `DeformConv` for RTX (see `lowering.py`).
        plan_path: File to write.
        config: What to build.
        progress: Called from within the compiler, several times a second.

    Raises:
        EngineBuildError: No such package, no GPU where one is needed, an ONNX that the parser does not take, of another
            wire format or in another precision, or the compiler failed.
    """
    kind = _KINDS[config.engine]
    module, gpu, capabilities = check_machine(config)
    logger = _logger(module)
    builder, network, _parser = _parse(module, logger, onnx_path)
    summary = check_network(module, network, config.precision)
    builder_config = _configure(module, builder, network, config, capabilities)
    monitor = _monitor(module, progress)
    builder_config.progress_monitor = monitor
    cache = _load_timing_cache(module, builder_config, config)
    described = _describe(module, builder_config, config, capabilities, gpu)
    hazards = _hazards(config, described["version"], summary)
    _LOG.info("building %s: %s", plan_path.name, ", ".join(f"{key} {value}" for key, value in described.items()))
    _LOG.info(
        "network: %s, optimization level %s",
        asdict(summary),
        getattr(builder_config, "builder_optimization_level", "?"),
    )
    for hazard in hazards:
        _LOG.warning("known wrong result: %s", hazard)
    started = time.monotonic()
    serialized = builder.build_serialized_network(network, builder_config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise EngineBuildError(f"{kind.title} could not compile {onnx_path.name}: {logger.text()}")
    seconds = time.monotonic() - started
    with plan_path.open("wb") as stream:
        stream.write(memoryview(serialized))
    size = serialized.nbytes
    if cache is not None and config.options.timing_cache is not None:
        _save_timing_cache(cache, config.options.timing_cache)
    _LOG.info("built %s: %.1f MiB in %.1f s", plan_path.name, size / 2**20, seconds)
    return Plan(plan_path, size, {**described, "seconds": round(seconds, 1)}, summary, hazards)


def parse_network(onnx_path: Path, engine: PlanEngine, precision: str) -> NetworkSummary:
    """Parse a serving ONNX with NVIDIA's parser and check the network; nothing is compiled.

    Raises:
        EngineBuildError: As `build_plan`.
    """
    module = load_module(engine)
    _builder, network, _parser = _parse(module, _logger(module), onnx_path)
    return check_network(module, network, precision)


def load_module(engine: PlanEngine) -> ModuleType:
    """Import the package that compiles plans of this kind.

    Raises:
        EngineBuildError: It is not installed, cannot be loaded, or is too old.
    """
    kind = _KINDS[engine]
    reasons = []
    for name in kind.modules:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as exc:  # OSError: a library of it is missing
            reasons.append(str(exc))
            continue
        version = _version(module.__version__)
        if version < kind.oldest:
            raise EngineBuildError(
                f"{kind.title} {module.__version__} is too old, at least {'.'.join(map(str, kind.oldest))} is needed "
                f"for strongly typed networks: {kind.install}"
            )
        return module
    raise EngineBuildError(
        f"engine kind {engine} needs {kind.title}, which cannot be imported ({'; '.join(reasons)}): {kind.install}"
    )


def check_machine(config: EngineConfig) -> tuple[ModuleType, Gpu | None, tuple[str, ...]]:
    """What a build needs and takes no time to find out.

    Returns:
        The compiler's module, the GPU at hand if there is one, and for RTX the compute capabilities to compile for.

    Raises:
        EngineBuildError: No such package, no GPU where one is needed, or a compute capability that is not compiled for.
    """
    kind = _KINDS[config.engine]
    module, gpu = load_module(config.engine), find_gpu()
    if kind.needs_gpu and gpu is None:
        raise EngineBuildError(
            f"{kind.title} compiles on the GPU that will run the plan, and this machine has none (the NVIDIA driver's "
            "libcuda.so.1 finds no GPU): build on that machine, or build an rtx engine, which needs no GPU"
        )
    if not kind.targets:
        return module, gpu, ()
    known = _known_capabilities(module)
    portable = [name for name in known if tuple(map(int, name.split("."))) >= _PORTABLE_FROM]
    wanted = config.options.compute_capabilities or tuple(portable)
    unknown = [capability for capability in wanted if capability not in known]
    if unknown:
        raise EngineBuildError(
            f"compute capability {', '.join(unknown)} is not one that {kind.title} {module.__version__} compiles for; "
            f"allowed are {', '.join(known)}"
        )
    return module, gpu, wanted


def _known_capabilities(module: ModuleType) -> dict[str, Any]:
    members = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    found = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}
    return dict(sorted(found.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])


@cache
def _shared_logger(logger_class: Any) -> Any:
    """The compiler's log: warnings to ours, errors kept for the exception that follows them.

    One for the process, because the compiler keeps to the first that it is given.
    """
    severity = logger_class.Severity

    class Logger(logger_class):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif level == severity.WARNING:
                _LOG.warning("%s", message)
            elif level == severity.INFO:
                _LOG.debug("%s", message)

        def text(self) -> str:
            return "; ".join(self.errors[-3:]) or "it gave no reason"

    return Logger()


def _logger(module: ModuleType) -> Any:
    """The compiler's log, without what earlier builds left in it."""
    logger = _shared_logger(module.ILogger)
    logger.errors.clear()
    return logger


def _monitor(module: ModuleType, progress: Progress | None) -> Any:
    """The compiler's progress, of its two outer levels, passed on; and the way to stop it."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, tuple[int, int]] = {}  # name -> depth, steps
            self.interrupted = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            depth = self.phases[parent][0] + 1 if parent in self.phases else 0
            self.phases[name] = depth, steps
            self._report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            # An exception must not cross the compiler's C++; this is where Ctrl-C arrives.
            try:
                self._report(name, step + 1)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, name: str) -> None:
            depth, steps = self.phases.pop(name, (0, 0))
            if depth <= 1 and progress is not None:
                progress(name, steps, steps)

        def _report(self, name: str, done: int) -> None:
            depth, steps = self.phases.get(name, (0, 0))
            if depth <= 1 and progress is not None:
                progress(name, done, steps)

    return Monitor()


def _parse(module: ModuleType, logger: Any, onnx_path: Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser; the parser owns the network's weights and must live as long."""
    try:
        builder = module.Builder(logger)
    except (RuntimeError, TypeError) as exc:  # no CUDA, or no driver for it
        raise EngineBuildError(f"{module.__name__} {module.__version__} cannot start: {logger.text()} ({exc})") from exc
    # 11 and RTX know no other networks, 10 must be told.
    strongly_typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = module.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(onnx_path))
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = [
            f"{error.node_name() or 'a node'} ({error.node_operator() or '?'}): {error.desc()}" for error in errors
        ]
        hint = " (see lowering.py)" if any(error.node_operator() == "DeformConv" for error in errors) else ""
        raise EngineBuildError(
            f"{module.__name__} {module.__version__} cannot take {onnx_path.name}: "
            f"{'; '.join(nodes) or logger.text()}{hint}"
        )
    if not network.num_layers:  # the parser takes many byte strings for an ONNX without nodes
        raise EngineBuildError(f"{onnx_path.name} holds no network; is it an ONNX?")
    return builder, network, parser


def _configure(
    module: ModuleType, builder: Any, network: Any, config: EngineConfig, capabilities: tuple[str, ...]
) -> Any:
    """The compiler's configuration."""
    kind = _KINDS[config.engine]
    builder_config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    picture = tuple(network.get_input(0).shape)[1:]
    profile.set_shape(INPUT_NAME, *((batch, *picture) for batch in (1, config.opt_batch_size, config.max_batch_size)))
    if builder_config.add_optimization_profile(profile) < 0:
        raise EngineBuildError(f"{kind.title} refused the profile for {INPUT_NAME} {list(picture)}")
    flag = module.BuilderFlag
    (builder_config.set_flag if config.options.tf32 else builder_config.clear_flag)(flag.TF32)
    if config.options.version_compatible:
        builder_config.set_flag(flag.VERSION_COMPATIBLE)
    if config.options.optimization_level is not None:
        builder_config.builder_optimization_level = config.options.optimization_level
    if config.options.hardware_compatibility != "none":
        level = getattr(module.HardwareCompatibilityLevel, config.options.hardware_compatibility.upper(), None)
        if level is None:
            raise EngineBuildError(
                f"{kind.title} {module.__version__} does not know hardware compatibility "
                f"{config.options.hardware_compatibility!r}; a newer one may"
            )
        builder_config.hardware_compatibility_level = level
    if capabilities:
        known = _known_capabilities(module)
        builder_config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            builder_config.set_compute_capability(known[capability], index)
    return builder_config


def _describe(
    module: ModuleType, builder_config: Any, config: EngineConfig, capabilities: tuple[str, ...], gpu: Gpu | None
) -> dict[str, Any]:
    """The manifest's `builder`."""
    targets = _KINDS[config.engine].targets
    flags = [name for name, flag in module.BuilderFlag.__members__.items() if builder_config.get_flag(flag)]
    return {
        "name": "tensorrt_rtx" if targets else "tensorrt",
        "version": module.__version__,
        "compute_capabilities": list(capabilities) or ([gpu.compute_capability] if gpu else []),
        "gpu": gpu.name if gpu is not None and not targets else None,
        "profile": {"min": 1, "opt": config.opt_batch_size, "max": config.max_batch_size},
        "flags": ["STRONGLY_TYPED", *sorted(flags)],
        "version_compatible": config.options.version_compatible,
        "hardware_compatibility": config.options.hardware_compatibility,
    }


def _hazards(config: EngineConfig, version: str, network: NetworkSummary) -> tuple[str, ...]:
    """Open issues about silently wrong plans that this compiler and network have the ingredients of.

    None of them can be seen in the network. What protects is the comparison on the GPU, at batch 1 and above, which
    `matteserve verify` and `matteserve swap` make; this only says where to look if it fails.
    """
    # TensorRT for RTX shares the compiler but not the version numbers: what is known of TensorRT is said for it.
    since = _version(version) if config.engine == "trt" else (99,)
    found = []
    if network.grid_samples and since >= (10, 14):
        found.append(
            "float32 GridSample differs from 10.14 on (NVIDIA/TensorRT issue 4813, pytorch/TensorRT issue 4074)"
        )
    if network.softmaxes and config.max_batch_size > 1 and since >= (10, 11):
        found.append("attention at batch sizes above 1 differs in 10.11 to 11.1 (NVIDIA/TensorRT issue 4853)")
    return tuple(found)


def _load_timing_cache(module: ModuleType, builder_config: Any, config: EngineConfig) -> Any:
    """The timing cache, attached to the configuration; None if there is to be none."""
    path = config.options.timing_cache
    if path is None:
        return None
    data = path.read_bytes() if path.is_file() else b""
    cache = builder_config.create_timing_cache(data)
    if cache is None or not builder_config.set_timing_cache(cache, ignore_mismatch=False):
        _LOG.warning("%s: not a timing cache of this GPU and %s %s; a new one is made", path, *_name(module))
        cache = builder_config.create_timing_cache(b"")
        builder_config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(cache: Any, path: Path) -> None:
    """Replace the file as a whole, so that a build that is killed leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(memoryview(cache.serialize()))
        temporary.replace(path)
    except OSError as exc:
        # The plan is good without it.
        _LOG.warning("%s: the timing cache could not be written: %s", path, exc.strerror or exc)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _name(module: ModuleType) -> tuple[str, str]:
    return module.__name__, module.__version__
