"""Generated scenes: the same each time, exact alpha, variety; and a training that really learns."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from click.testing import CliRunner  # noqa: E402

from matteserve_export.demo_model import evaluate as evaluation  # noqa: E402
from matteserve_export.demo_model import scenes, train  # noqa: E402
from matteserve_export.demo_model.muon import Muon, orthogonal  # noqa: E402
from matteserve_export.demo_model.pool import build_pool  # noqa: E402
from matteserve_export.demo_model.shapes import FAMILIES, transform  # noqa: E402
from matteserve_export.demo_model.textures import blur, texture  # noqa: E402

SIZE = 48


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [scenes.generate(11, index, SIZE) for index in range(150)]


# --- scenes ---


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**31), size=st.integers(24, 80))
def test_a_scene_depends_on_seed_index_and_size_alone(seed: int, index: int, size: int) -> None:
    first, second = scenes.generate(seed, index, size), scenes.generate(seed, index, size)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.alpha, second.alpha)
    assert first.families == second.families
    assert first.image.shape == (size, size, 3)
    assert first.alpha.shape == (size, size)
    assert first.image.dtype == first.alpha.dtype == np.uint8


def test_neighbouring_scenes_and_series_differ() -> None:
    base = scenes.generate(1, 0, SIZE)
    for other in (scenes.generate(1, 1, SIZE), scenes.generate(2, 0, SIZE)):
        assert not np.array_equal(base.image, other.image)


def test_alpha_is_the_one_that_the_composition_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With white objects, no shadow and no camera, over black, the picture is its own alpha."""

    def white(rng: np.random.Generator, name: str, parts: Any, box: Any, size: int) -> Any:
        made = original(rng, name, parts, box, size)
        return made._replace(colour=np.ones((size, size, 3), dtype=np.float32))

    original = scenes._object
    black = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    monkeypatch.setattr(scenes, "_object", white)
    monkeypatch.setattr(scenes, "_background", lambda rng, size, shares: ("black", black))
    monkeypatch.setattr(scenes, "_shadow", lambda rng, image, item, light: image)
    monkeypatch.setattr(scenes, "_reflection", lambda rng, image, item: image)
    monkeypatch.setattr(scenes, "_visible", lambda rng, image, item: item)
    monkeypatch.setattr(scenes, "_camera", lambda rng, image: np.round(image * 255).astype(np.uint8))
    monkeypatch.setattr(scenes, "_over", lambda front, back, alpha, linear: over(front, back, alpha, False))
    soft = 0
    for index in range(20):
        scene = scenes.generate(5, index, SIZE)
        difference = scene.image[..., 0].astype(int) - scene.alpha.astype(int)
        assert np.abs(difference).max() <= 1
        soft += int(((scene.alpha > 0) & (scene.alpha < 255)).sum())
    assert soft > 500  # edges are not binary


over = scenes._over


def test_scenes_vary(many: list[scenes.Scene]) -> None:
    backgrounds = Counter(scene.background for scene in many)
    assert set(backgrounds) == {"studio", "surface", "room", "landscape", "clutter"}
    assert backgrounds.most_common(1)[0][0] == "studio"
    assert len({family for scene in many for family in scene.families}) >= 0.8 * len(FAMILIES)
    assert {len(scene.families) for scene in many} == {1, 2, 3}
    share = np.array([(scene.alpha > 127).mean() for scene in many])
    assert share.min() > 0.005
    assert share.max() > 0.6
    assert 0.15 < share.mean() < 0.45
    touching = [scene for scene in many if scene.alpha[-1].max() > 127 or scene.alpha[:, 0].max() > 127]
    assert len(touching) > 5
    brightness = [scene.image[scene.alpha == 0].mean() for scene in many]
    assert min(brightness) < 40
    assert max(brightness) > 215


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fills_its_box(family: str) -> None:
    builder, _, _ = FAMILIES[family]
    for seed in range(10):
        parts = transform(builder(np.random.default_rng(seed)), (0.1, 0.2, 0.8, 0.9))
        points = np.concatenate([part.points for part in parts])
        np.testing.assert_allclose(points.min(0), (0.1, 0.2), atol=1e-9)
        np.testing.assert_allclose(points.max(0), (0.8, 0.9), atol=1e-9)
        assert {part.material for part in parts} <= {0, 1, 2, 3}


def test_textures_are_colours() -> None:
    for seed in range(60):
        surface = texture(np.random.default_rng(seed), 32)
        assert surface.shape == (32, 32, 3)
        assert surface.dtype == np.float32
        assert 0.0 <= surface.min() <= surface.max() <= 1.0


@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])
def test_blur_has_the_width_asked_for_and_keeps_the_sum(sigma: float) -> None:
    impulse = np.zeros((61, 61), dtype=np.float32)
    impulse[30, 30] = 1.0
    blurred = blur(impulse, sigma)
    offset = np.arange(61) - 30.0
    assert blurred.sum() == pytest.approx(1.0, abs=1e-4)
    assert (blurred.sum(0) * offset).sum() == pytest.approx(0.0, abs=1e-3)
    assert np.sqrt((blurred.sum(0) * offset**2).sum()) == pytest.approx(sigma, rel=0.3)


def test_blur_of_nothing_changes_nothing() -> None:
    image = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    assert np.array_equal(blur(image, 0.1), image)


def test_pool_holds_the_scenes_and_is_made_once(tmp_path: Path) -> None:
    pool = build_pool(tmp_path, 4, 32, 3, processes=1)
    scene = scenes.generate(4, 2, 32)
    assert pool.shape == (3, 32, 32, 4)
    assert np.array_equal(pool[2, ..., :3], scene.image)
    assert np.array_equal(pool[2, ..., 3], scene.alpha)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    build_pool(tmp_path, 4, 32, 3)
    assert path.stat().st_mtime_ns == written


# --- training ---


@pytest.fixture
def pool() -> np.ndarray[Any, Any]:
    made = [scenes.generate(1, index, 40) for index in range(6)]
    return np.stack([np.concatenate((scene.image, scene.alpha[..., None]), 2) for scene in made])


def test_batches_follow_from_seed_and_step(pool: np.ndarray[Any, Any]) -> None:
    image, alpha = train.sample_batch(pool, 4, 32, 1, 5)
    again, _ = train.sample_batch(pool, 4, 32, 1, 5)
    other, _ = train.sample_batch(pool, 4, 32, 1, 6)
    assert image.shape == (4, 3, 32, 32)
    assert alpha.shape == (4, 1, 32, 32)
    assert torch.equal(image, again)
    assert not torch.equal(image, other)
    assert 0.0 <= float(alpha.min()) <= float(alpha.max()) <= 1.0
    assert 0.0 <= float(image.min()) <= float(image.max()) <= 255.0


def test_normalise_is_the_serving_graphs() -> None:
    grey = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(train.normalise(grey)[0, :, 0, 0].numpy(), expected, rtol=1e-5)


def test_loss_is_small_for_the_right_maps_and_large_for_the_inverse() -> None:
    alpha = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    right = (alpha * 2 - 1) * 12
    assert float(train.loss_of((right,) * 7, alpha)) < 0.01
    assert float(train.loss_of((-right,) * 7, alpha)) > 10


def test_learning_rate_rises_then_falls() -> None:
    rates = [train.learning_rate(step, 300, 1.0, decay=100) for step in range(300)]
    assert rates[0] < 0.05
    assert rates[49:201] == [1.0] * 152
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert 0.0 < rates[-1] < 0.02


def test_muon_makes_the_update_orthogonal_and_lowers_a_loss() -> None:
    torch.manual_seed(0)
    for shape in ((8, 30), (30, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    weight = torch.nn.Parameter(torch.randn(6, 3, 3, 3))
    goal, unused = torch.randn(6, 3, 3, 3), torch.nn.Parameter(torch.ones(2, 2))
    optimiser = Muon([weight, unused], lr=0.1, weight_decay=0.0)
    losses = []
    for _ in range(100):
        loss = (weight - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(unused, torch.ones(2, 2))


def test_a_short_training_lowers_the_loss_and_continues_where_it_stopped(tmp_path: Path) -> None:
    run, scenes_folder = tmp_path / "run", tmp_path / "pool"
    build_pool(scenes_folder, 1, 32, 8, hard=True, processes=1)
    build_pool(scenes_folder, train.VALIDATION_SEED, 128, 2, processes=1)
    stage = train.Stage(size=32, batch=3, steps=40, pool_size=32, pool_count=8)
    weights = train.train(
        run, scenes_folder, (stage,), seed=1, peak_rate=3e-3, decay=10, save_every_s=1e9, validation_count=2
    )
    rows = list(csv.DictReader((run / "loss.csv").read_text().splitlines()))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == 2
    assert losses[1] < 0.95 * losses[0]
    assert 0.0 <= float(rows[-1]["validation_iou"]) <= 1.0

    longer = train.Stage(size=32, batch=3, steps=41, pool_size=32, pool_count=8)
    train.train(run, scenes_folder, (longer,), seed=1, peak_rate=3e-3, decay=10, save_every_s=1e9, validation_count=2)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 41

    model = evaluation.load_model(weights)
    assert not model.training
    result = evaluation.evaluate(model, 32, 2)
    assert result["scenes"] == 2
    assert 0.0 <= float(str(result["iou"])) <= 1.0


def test_prediction_is_stretched_to_the_whole_range() -> None:
    class Faint(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return 0.4 + 0.2 * (x[:, :1] > 0).float()

    image = np.zeros((20, 30, 3), dtype=np.uint8)
    image[5:15, 10:20] = 255
    alpha = evaluation.predict(Faint(), image, 32)
    assert alpha.shape == (20, 30)
    assert alpha.min() == 0.0
    assert alpha[10, 15] == 1.0


@pytest.mark.parametrize("text", ["64:8", "64:8:x:128:500", "-1:8:1:128:500"])
def test_a_malformed_stage_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not size:batch:steps:pool_size:pool_count, for example 64:8:"):
        train.Stage.parse(text)
    result = CliRunner().invoke(train.main, ["--out", "x", "--pool", "y", "--stage", text])
    assert result.exit_code == 2
    assert "is not size:batch:steps" in result.output
