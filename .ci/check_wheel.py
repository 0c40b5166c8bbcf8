"""Check that a wheel holds exactly the packages it should, typed, with the demonstration model, and nothing else."""

import sys
import zipfile

PACKAGES = {"matteserve_client", "matteserve_server", "matteserve_export", "matteserve_bench"}
BUNDLED = "matteserve_server/bundled/"
NEEDED = {
    *(f"{package}/py.typed" for package in PACKAGES),
    "matteserve_server/backends/onnxruntime/model.py",
    f"{BUNDLED}model_repository/demo/config.pbtxt",
    f"{BUNDLED}model_repository/demo_onnx_fp32/config.pbtxt",
    f"{BUNDLED}model_repository/demo_onnx_fp32/1/model.onnx",
    f"{BUNDLED}examples/scene.jpg",
}
LARGEST_MIB = 8


def main(path: str) -> None:
    """Exit with a message if the wheel at `path` is not as it should be."""
    with zipfile.ZipFile(path) as wheel:
        names = {entry.filename for entry in wheel.infolist()}
        size = sum(entry.compress_size for entry in wheel.infolist()) / 2**20
    top = {name.split("/")[0] for name in names}
    unexpected = {name for name in top if name not in PACKAGES and not name.endswith(".dist-info")}
    models = {name.split("/")[3] for name in names if name.startswith(f"{BUNDLED}model_repository/")}
    problems = {
        "unexpected at the top": unexpected,
        "packages missing": PACKAGES - top,
        "files missing": NEEDED - names,
        "models that should not be there": models - {"demo", "demo_onnx_fp32"},
        "too large": {f"{size:.1f} MiB"} if size > LARGEST_MIB else set(),
    }
    found = {problem: sorted(what) for problem, what in problems.items() if what}
    sys.exit(f"{path}: {found}" if found else 0)


if __name__ == "__main__":
    main(sys.argv[1])
