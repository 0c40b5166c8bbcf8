"""Client and AsyncClient over a transport without a network: order, bounds, caches, second attempts."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import model_config_pb2

from matteserve_client import (
    AsyncClient,
    Client,
    ContractError,
    DeadlineExceededError,
    InferenceError,
    InvalidImageError,
    InvalidRequestError,
    Matte,
    MatteserveError,
    ModelContract,
    ModelNotFoundError,
    ModelStatus,
    ServerOverloadedError,
    ServerUnavailableError,
)
from matteserve_client._client import CPU_WORKERS
from matteserve_client._images import load_picture
from matteserve_client._preprocess import image_tensor

RNG = np.random.default_rng(11)


def photo(height: int = 30, width: int = 40) -> Any:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def flat(value: int) -> Any:
    return np.full((6, 8, 3), value, np.uint8)


class Asked:
    """Calls the blocking or the asynchronous client in the same way, so that one test covers both."""

    def __init__(self, kind: str, transport: Any, async_transport: Any) -> None:
        self.kind, self._sync, self._async = kind, transport, async_transport

    def __call__(self, use: Any, **options: Any) -> Any:
        """`use` takes a client and returns a value, an awaitable, or an (async) iterator, which becomes a list."""
        if self.kind == "sync":
            with Client(transport=self._sync, **options) as client:
                result = use(client)
                return list(result) if isinstance(result, Iterator) else result

        async def run() -> Any:
            async with AsyncClient(transport=self._async, **options) as client:
                result = use(client)
                if isinstance(result, AsyncIterator):
                    return [item async for item in result]
                return await result if inspect.isawaitable(result) else result

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, fake: Any, async_fake: Any) -> Asked:
    return Asked(request.param, fake, async_fake)


# -- one picture


def test_alpha(ask: Asked, fake: Any) -> None:
    image = photo(24, 32)  # the model's own size: nothing is resampled
    alpha = ask(lambda client: client.alpha(image, model="demo", timeout_s=7))
    np.testing.assert_array_equal(alpha, image[..., 1].astype(np.float32) / np.float32(255))
    assert fake.calls == [("config", "demo"), ("infer", ("demo", (1, 24, 32, 3), 7))]


def test_remove(ask: Asked) -> None:
    image = photo(24, 32)
    cutout = ask(lambda client: client.remove(image))
    assert cutout.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(cutout), np.dstack([image, image[..., 1]]))


def test_matte_and_timings(ask: Asked, fake: Any) -> None:
    fake.delay_s = 0.05
    matte = ask(lambda client: client.matte(photo()))
    assert matte.model == "demo"
    assert matte.alpha.shape == (30, 40)
    assert 0.05 <= matte.timings.request < 5
    assert all(0 <= seconds < 5 for seconds in dataclasses.astuple(matte.timings))
    with pytest.raises(dataclasses.FrozenInstanceError):
        matte.model = "other"


def smooth_jpeg(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(6, 8)).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def test_alpha_only_has_no_cutout_and_follows_the_full_decode(fake: Any) -> None:
    data = smooth_jpeg(480, 640)  # twenty times the model's size
    with Client(transport=fake) as client:
        full, matte, alpha = client.matte(data), client.matte(data, alpha_only=True), client.alpha(data)
    assert matte.size == full.size == (480, 640)
    assert np.abs(matte.alpha - full.alpha).max() < 6 / 255
    assert 0 < np.abs(matte.alpha - full.alpha).mean() < 1 / 255
    with pytest.raises(ValueError, match="made with alpha_only=True"):
        matte.cutout()
    np.testing.assert_array_equal(alpha, matte.alpha)


def test_alpha_only_sends_what_a_smaller_decode_gives(ask: Asked, fake: Any) -> None:
    data = smooth_jpeg(480, 640)
    sent: list[Any] = []

    def answer(images: Any) -> Any:
        sent.append(images)
        return images[..., 1]

    fake.answer = answer
    assert ask(lambda client: client.alpha(data)).shape == (480, 640)
    contract = ModelContract.from_config(fake.configs["demo"])
    np.testing.assert_array_equal(sent[0], image_tensor(load_picture(data, at_least=2 * 32), contract))


def test_parity_never_decodes_smaller(fake: Any) -> None:
    data = smooth_jpeg(480, 640)
    with Client(transport=fake, parity="rembg") as client:
        np.testing.assert_array_equal(client.alpha(data), client.matte(data).alpha)


def test_bad_picture_sends_nothing(ask: Asked, fake: Any) -> None:
    with pytest.raises(InvalidImageError, match="is empty"):
        ask(lambda client: client.remove(b""))
    assert fake.calls == []


def test_max_pixels(ask: Asked) -> None:
    with pytest.raises(InvalidImageError, match="the limit is 100;"):
        ask(lambda client: client.remove(photo()), max_pixels=100)


def test_parity_changes_the_tensor_and_is_refused_elsewhere(ask: Asked, fake: Any, config: Any) -> None:
    dark = np.full((24, 32, 3), 100, np.uint8)
    assert ask(lambda client: client.alpha(dark), parity="rembg").max() == 1.0
    fake.configs["demo"] = config(architecture="isnet")
    fake.calls.clear()
    with pytest.raises(ContractError, match="parity='rembg' is defined for u2net and u2netp"):
        ask(lambda client: client.alpha(dark), parity="rembg")
    assert fake.count("infer") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, "timeout_s is 0, must be a number of seconds above 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan, must be a number of seconds above 0"),
        ({"parity": "official"}, "parity is 'official', must be None or 'rembg'"),
        ({"max_pixels": 0}, "max_pixels is 0, must be at least 1"),
    ],
)
def test_wrong_options(ask: Asked, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(lambda client: client.models(), **options)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://localhost:8001", "gRPC takes host:port without a scheme"),
        ("localhost", "must be host:port"),
    ],
)
def test_wrong_address(kind: Any, address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(address)


def test_both_clients_have_the_same_methods() -> None:
    def signatures(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert signatures(Client) == signatures(AsyncClient)


# -- which model


def test_the_only_alias_is_the_default(ask: Asked, fake: Any, config: Any) -> None:
    fake.configs["demo_onnx_fp32"] = config("demo_onnx_fp32", platform="")
    fake.configs["resnet"] = model_config_pb2.ModelConfig(name="resnet", platform="onnxruntime_onnx")
    fake.extra_statuses = [ModelStatus("sleeping", False)]
    matte = ask(lambda client: client.matte(photo()))
    assert matte.model == "demo"
    assert fake.count("index") == 1
    assert fake.count("config") == 3  # not a second time for the contract


def test_a_lone_engine_without_alias_is_the_default(ask: Asked, fake: Any, config: Any) -> None:
    fake.configs = {"demo_onnx_fp32": config("demo_onnx_fp32", platform="")}
    assert ask(lambda client: client.matte(photo())).model == "demo_onnx_fp32"


@pytest.mark.parametrize(("names", "found"), [(["a", "b"], "it serves a, b"), ([], "it serves none")])
def test_no_default_among_several_or_none(ask: Asked, fake: Any, config: Any, names: list[str], found: str) -> None:
    fake.configs = {name: config(name) for name in names}
    with pytest.raises(ModelNotFoundError) as caught:
        ask(lambda client: client.alpha(photo()))
    assert str(caught.value) == f"fake:8001: which model? {found}; name one with model=... or --model"


def test_contract_and_default_are_read_once(fake: Any) -> None:
    with Client(transport=fake) as client:
        for _ in range(3):
            client.alpha(photo())
        assert client.contract().input_shape == (24, 32, 3)
        assert client.contract("demo") is client.contract()
    assert (fake.count("index"), fake.count("config"), fake.count("infer")) == (1, 1, 3)


def test_contract_of_a_foreign_model(ask: Asked, fake: Any) -> None:
    fake.configs["resnet"] = model_config_pb2.ModelConfig(name="resnet")
    with pytest.raises(ContractError, match="model 'resnet': the wire format is"):
        ask(lambda client: client.contract("resnet"))


# -- second attempts


def test_new_size_is_noticed(fake: Any, config: Any) -> None:
    with Client(transport=fake) as client:
        client.alpha(photo())
        fake.configs["demo"] = config(size=(48, 64))

        def refuse_the_old_size(images: Any) -> Any:
            if images.shape[1:3] != (48, 64):
                raise InvalidRequestError("unexpected shape for input 'image'")
            return images[..., 0]

        fake.answer = refuse_the_old_size
        assert client.alpha(photo()).shape == (30, 40)
        assert client.contract("demo").height == 48
    assert [shape for name, (_, shape, _) in ((n, c) for n, c in fake.calls if n == "infer")] == [
        (1, 24, 32, 3),
        (1, 24, 32, 3),
        (1, 48, 64, 3),
    ]


def test_same_contract_is_no_reason_to_try_again(ask: Asked, fake: Any) -> None:
    def refuse(images: Any) -> Any:
        raise InvalidRequestError("no")

    fake.answer = refuse
    with pytest.raises(InvalidRequestError, match="no"):
        ask(lambda client: client.alpha(photo(), model="demo"))
    assert (fake.count("config"), fake.count("infer")) == (2, 1)


def test_only_one_second_attempt(ask: Asked, fake: Any, config: Any) -> None:
    def refuse_and_change(images: Any) -> Any:
        fake.configs["demo"] = config(size=(images.shape[1] + 8, 32))
        raise InvalidRequestError("still no")

    fake.answer = refuse_and_change
    with pytest.raises(InvalidRequestError, match="still no"):
        ask(lambda client: client.alpha(photo(), model="demo"))
    assert fake.count("infer") == 2


def test_model_that_went_away_is_looked_for_again(fake: Any, config: Any) -> None:
    with Client(transport=fake) as client:
        client.alpha(photo())

        def gone(images: Any) -> Any:
            raise ModelNotFoundError("gone")

        fake.answer = gone
        fake.configs = {"next": config("next")}
        with pytest.raises(ModelNotFoundError, match="gone"):
            client.alpha(photo())
        fake.answer = lambda images: images[..., 0]
        assert client.matte(photo()).model == "next"


@pytest.mark.parametrize("wrong", [lambda a: a[:, :5, :, 0], lambda a: a[0, ..., 0], lambda a: a[..., 0].astype(float)])
def test_answer_that_contradicts_the_contract(ask: Asked, fake: Any, wrong: Any) -> None:
    fake.answer = wrong
    with pytest.raises(InferenceError, match=r"the answer is .*, its contract says uint8 \(1, 24, 32\)"):
        ask(lambda client: client.alpha(photo()))


# -- models, ready, close


def test_models(ask: Asked, fake: Any) -> None:
    fake.extra_statuses = [ModelStatus("broken", False, "no such file")]
    assert ask(lambda client: client.models()) == [
        ModelStatus("demo", True),
        ModelStatus("broken", False, "no such file"),
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(True, True), (False, False), (ServerUnavailableError("down"), False), (DeadlineExceededError("slow"), False)],
)
def test_ready(ask: Asked, fake: Any, answer: Any, expected: bool) -> None:
    fake.is_ready = answer
    assert ask(lambda client: client.ready()) is expected


def test_ready_does_not_hide_other_failures(ask: Asked, fake: Any) -> None:
    fake.is_ready = InferenceError("not a Triton")
    with pytest.raises(InferenceError):
        ask(lambda client: client.ready())


def test_context_manager_closes_the_transport(ask: Asked, fake: Any) -> None:
    ask(lambda client: client.models())
    assert fake.closed


# -- many pictures


def test_remove_many_keeps_order_and_isolates_failures(ask: Asked, fake: Any) -> None:
    def jitter(images: Any) -> Any:
        time.sleep(float(RNG.random()) * 0.02)
        if images[0, 0, 0, 0] == 50:
            raise ServerOverloadedError("queue full")
        return images[..., 1]

    fake.answer = jitter
    images: list[Any] = [flat(value) for value in range(100)]
    images[20], images[70] = b"not an image", np.zeros((3, 3))
    results = ask(lambda client: client.remove_many(images))
    assert len(results) == 100
    for index, result in enumerate(results):
        if index in (20, 70):
            assert isinstance(result, InvalidImageError)
        elif index == 50:
            assert isinstance(result, ServerOverloadedError)
        else:
            assert result.getpixel((0, 0)) == (index, index, index, index)


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_remove_many_keeps_exactly_so_many_in_flight(ask: Asked, fake: Any, in_flight: int) -> None:
    fake.delay_s = 0.03
    ask(lambda client: client.remove_many([flat(1)] * 40, in_flight=in_flight, model="demo"))
    assert fake.most_outstanding == in_flight


def test_remove_many_is_lazy_and_bounded(fake: Any) -> None:
    taken: list[int] = []

    def source() -> Iterator[Any]:
        for index in range(1000):
            taken.append(index)
            yield flat(index % 256)

    with Client(transport=fake) as client:
        results = client.remove_many(source(), in_flight=4)
        assert taken == []
        for given in range(20):
            next(results)
            assert len(taken) <= given + 1 + 4 + CPU_WORKERS
        results.close()  # type: ignore[attr-defined]
        assert len(taken) < 40


def test_async_remove_many_is_lazy_and_bounded(async_fake: Any) -> None:
    taken: list[int] = []

    async def source() -> AsyncIterator[Any]:
        for index in range(1000):
            taken.append(index)
            yield flat(index % 256)

    async def run() -> None:
        async with AsyncClient(transport=async_fake) as client:
            results = client.remove_many(source(), in_flight=4)
            assert taken == []
            for given in range(20):
                assert (await anext(results)).getpixel((0, 0))[0] == given  # type: ignore[union-attr,index]
                assert len(taken) <= given + 1 + 4 + CPU_WORKERS
            await results.aclose()  # type: ignore[attr-defined]
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_remove_many_makes_what_is_asked_for(ask: Asked) -> None:
    images = [flat(value) for value in range(9)]
    images[3] = b"not an image"
    results = ask(lambda client: client.remove_many(images, output=Matte.encode))
    assert isinstance(results[3], InvalidImageError)
    for value, result in enumerate(results):
        if value != 3:
            assert Image.open(io.BytesIO(result)).getpixel((0, 0)) == (value,) * 4


def test_remove_many_of_alphas_only(ask: Asked) -> None:
    data = [smooth_jpeg(240, 320)] * 3
    alphas = ask(lambda client: client.remove_many(data, alpha_only=True, output=lambda matte: matte.alpha))
    assert [alpha.shape for alpha in alphas] == [(240, 320)] * 3


def test_a_failing_output_is_not_hidden(ask: Asked) -> None:
    with pytest.raises(ValueError, match="made with alpha_only=True"):
        ask(lambda client: client.remove_many([flat(1)] * 3, alpha_only=True))


def test_outputs_are_made_few_at_a_time(ask: Asked) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def output(matte: Matte) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    ask(lambda client: client.remove_many([flat(1)] * 30, output=output))
    assert most == CPU_WORKERS


def test_remove_many_of_nothing(ask: Asked, fake: Any) -> None:
    assert ask(lambda client: client.remove_many([])) == []
    assert fake.calls == []


def test_remove_many_checks_its_arguments_at_once(fake: Any, async_fake: Any) -> None:
    for client in (Client(transport=fake), AsyncClient(transport=async_fake)):
        with pytest.raises(ValueError, match="in_flight is 0, must be at least 1"):
            client.remove_many([], in_flight=0)
        with pytest.raises(ValueError, match="timeout_s is -1"):
            client.remove_many([], timeout_s=-1)


def test_failing_input_iterator_raises_after_what_was_begun(fake: Any) -> None:
    def source() -> Iterator[Any]:
        yield flat(1)
        yield flat(2)
        raise OSError("disk gone")

    with Client(transport=fake) as client:
        results = client.remove_many(source())
        assert [next(results).getpixel((0, 0))[0] for _ in range(2)] == [1, 2]  # type: ignore[union-attr,index]
        with pytest.raises(OSError, match="disk gone"):
            next(results)


def test_closing_early_gives_requests_up(fake: Any) -> None:
    fake.hold = lambda images: bool(images.any())  # only black pictures are ever answered

    def source() -> Iterator[Any]:
        yield flat(0)
        while fake.count("infer") < 1:  # else the others might take all the places first, for good
            time.sleep(0.001)
        yield from [flat(1)] * 50

    with Client(transport=fake) as client:
        results = client.remove_many(source(), in_flight=4, model="demo")
        next(results)
        while fake.outstanding < 4:
            time.sleep(0.001)
        start = time.monotonic()
        results.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 5
    assert fake.cancelled >= 4
    assert fake.count("infer") <= 1 + 4 + CPU_WORKERS


def test_a_bug_is_not_hidden(ask: Asked, fake: Any) -> None:
    def bug(images: Any) -> Any:
        raise ZeroDivisionError

    fake.answer = bug
    with pytest.raises(ZeroDivisionError):
        ask(lambda client: client.remove_many([flat(1)] * 3))


def test_paths_work_in_many(ask: Asked, tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(flat(index)).save(tmp_path / f"{index}.png")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "absent.png"]
    results = ask(lambda client: client.remove_many(paths))
    assert [r.getpixel((0, 0))[0] for r in results[:3]] == [0, 1, 2]
    assert isinstance(results[3], InvalidImageError)


# -- threads and tasks


def test_threads_share_a_client(fake: Any) -> None:
    fake.delay_s = 0.002
    with Client(transport=fake) as client, ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(client.alpha, flat(value % 256)) for value in range(400)]
        for value, job in enumerate(jobs):
            assert job.result()[0, 0] == np.float32(value % 256) / np.float32(255)


def test_tasks_share_a_client(async_fake: Any) -> None:
    async def run() -> list[Any]:
        async with AsyncClient(transport=async_fake) as client:
            return await asyncio.gather(*(client.alpha(flat(value)) for value in range(100)))

    for value, alpha in enumerate(asyncio.run(run())):
        assert alpha[0, 0] == np.float32(value) / np.float32(255)


def test_the_loop_stays_responsive(async_fake: Any) -> None:
    large = np.asarray(Image.effect_noise((4000, 3000), 50).convert("RGB"))

    async def run() -> float:
        longest = 0.0
        async with AsyncClient(transport=async_fake) as client:
            task = asyncio.create_task(client.remove(large))
            while not task.done():
                start = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - start)
            await task
        return longest

    assert asyncio.run(run()) < 0.5


def test_every_error_is_a_matteserve_error() -> None:
    for kind in (InvalidImageError, ModelNotFoundError, ServerOverloadedError, DeadlineExceededError, ContractError):
        assert issubclass(kind, MatteserveError)
