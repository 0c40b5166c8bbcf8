"""One side's client, in a process of its own: `worker.py SIDE OPTIONS`, run by path with that side's Python.

Reads one JSON command a line from stdin, answers one JSON line on stdout. Every side's pictures go through the same
loop: so many threads, each taking the next encoded picture as soon as it has the encoded cut-out of the one before.
Nothing of matteserve is imported unless it is the side, so that memory can be compared.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Work = Callable[[bytes], bytes]


def rembg_in_process(model: str) -> Work:
    """The function `rembg.remove()`, with a session as `rembg.new_session` makes it."""
    from rembg import new_session, remove

    session = new_session(model, providers=["CPUExecutionProvider"])
    return lambda data: remove(data, session=session)


def rembg_over_http(model: str, port: int) -> Work:
    """`rembg s`: one connection a thread, kept open."""
    import http.client

    boundary = "matteserve-comparison"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="picture"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    local = threading.local()

    def work(data: bytes) -> bytes:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = head + data + f"\r\n--{boundary}--\r\n".encode()
        local.connection.request("POST", "/api/remove", body, headers)
        response = local.connection.getresponse()
        answer: bytes = response.read()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {answer[:200]!r}")
        return answer

    return work


def matteserve(model: str, address: str, parity: str | None = None, clear_transparent: bool = False) -> Work:
    """The client as anybody uses it: encoded picture in, encoded cut-out back."""
    from matteserve_client import Client

    client = Client(address, model=model, parity=parity, timeout_s=300)  # type: ignore[arg-type]
    client.contract()
    return lambda data: client.matte(data).encode(clear_transparent=clear_transparent)


def matteserve_tensors(model: str, address: str) -> Work:
    """Only the server: the same prepared tensor again and again, no picture."""
    import numpy as np

    from matteserve_client import Client, GrpcTransport

    with Client(address) as client:
        shape = (1, *client.contract(model).input_shape)
    tensor = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    transport = GrpcTransport(address)
    return lambda data: bytes(len(transport.infer(model, tensor, timeout_s=300).result()))


def bare_session(path: str) -> Work:
    """The floor of serving: a bare ONNX Runtime session on a prepared tensor, as many threads as there are cores."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape
    tensor = np.random.default_rng(0).integers(0, 256, (1, *shape[1:]), np.uint8)
    return lambda data: bytes(len(session.run(None, {name: tensor})[0]))


SIDES: dict[str, Callable[..., Work]] = {
    "rembg": rembg_in_process,
    "rembg-http": rembg_over_http,
    "matteserve": matteserve,
    "tensors": matteserve_tensors,
    "bare": bare_session,
}


def run(work: Work, paths: list[str], concurrency: int, keep: str | None) -> dict[str, Any]:
    """Process every picture once.

    Returns:
        `seconds` from the first start to the last end; `records`: start and end (seconds on the monotonic clock),
        bytes of the output and error, one list each in the order of `paths`; `cpu_s` of this process.
    """
    pictures = [Path(path).read_bytes() for path in paths]

    def one(index: int) -> list[Any]:
        start, size, error = time.perf_counter(), 0, ""
        try:
            output = work(pictures[index])
            size = len(output)
            if keep is not None:
                (Path(keep) / f"{Path(paths[index]).stem}.png").write_bytes(output)
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
        return [start, time.perf_counter(), size, error]

    cpu = time.process_time()
    with ThreadPoolExecutor(concurrency) as pool:
        records = list(pool.map(one, range(len(pictures))))
    seconds = max(record[1] for record in records) - min(record[0] for record in records)
    return {"seconds": seconds, "records": records, "cpu_s": time.process_time() - cpu}


def main() -> None:
    """Answer commands until stdin ends."""
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(work, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
