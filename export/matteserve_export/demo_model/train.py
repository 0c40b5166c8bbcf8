"""Train the demonstration model on generated scenes.

    python -m matteserve_export.demo_model.train --out runs/demo --pool runs/pool

Every batch follows from the seed and the step number, so that an interrupted run continues as if nothing had happened
(same command again). Training goes through stages of growing picture size: most steps at small sizes, where they are
cheap.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from matteserve_export.demo_model.muon import Muon
from matteserve_export.demo_model.pool import build_pool
from matteserve_export.models.u2net import U2Net, u2netp

__all__ = ["Stage", "learning_rate", "loss_of", "normalise", "sample_batch", "train"]

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
VALIDATION_SEED = 2
_WARM_UP = 50

DEFAULT_STAGES = ("64:8:900:128:5000", "96:8:350:128:5000", "128:6:360:128:5000", "192:4:190:224:800")


@dataclass(frozen=True)
class Stage:
    """Part of a run at one picture size.

    Attributes:
        size: Height and width in pixels of the pictures that the network sees.
        batch: Pictures in a batch.
        steps: Optimiser steps.
        pool_size: Height and width of the generated scenes, which are cropped and shrunk to ``size``.
        pool_count: Number of generated scenes to draw from.
    """

    size: int
    batch: int
    steps: int
    pool_size: int
    pool_count: int

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read ``size:batch:steps:pool_size:pool_count``.

        Raises:
            ValueError: The text has another form.
        """
        numbers = text.split(":")
        if len(numbers) != 5 or not all(number.isdigit() for number in numbers):
            raise ValueError(
                f"stage {text!r} is not size:batch:steps:pool_size:pool_count, for example {DEFAULT_STAGES[0]}"
            )
        return cls(*(int(number) for number in numbers))


def normalise(image: Tensor) -> Tensor:
    """Pixel values as the serving graph makes them, from RGB of 0 to 255, (B, 3, H, W), uint8 or float."""
    return (image.float() / 255.0 - MEAN.to(image.device)) / STD.to(image.device)


def sample_batch(pool: NDArray[np.uint8], batch: int, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw and augment one batch.

    Args:
        pool: Scenes, shape (N, S, S, 4), uint8.
        batch: Pictures to draw.
        size: Height and width to return.
        seed: Seed of the run.
        step: Number of the step; equal numbers give equal batches.

    Returns:
        Images (B, 3, size, size), float32 of 0 to 255, and alpha (B, 1, size, size), float32 in [0, 1].
    """
    rng = np.random.default_rng((seed, 7, step))
    full = pool.shape[1]
    pictures = []
    for index in rng.integers(0, len(pool), batch):
        side = rng.uniform(0.72, 1.0, 2) if rng.random() < 0.6 else np.ones(2)  # crop; its aspect stretches the picture
        height, width = (int(v) for v in np.maximum(side * full, 8))
        top, left = int(rng.integers(0, full - height + 1)), int(rng.integers(0, full - width + 1))
        crop = np.array(pool[index, top : top + height, left : left + width])
        if rng.random() < 0.5:
            crop = crop[:, ::-1].copy()
        if rng.random() < 0.2:
            crop[..., :3] = crop[..., rng.permutation(3)]
        picture = torch.from_numpy(crop).permute(2, 0, 1)[None].float()
        if (height, width) != (size, size):
            picture = F.interpolate(picture, size=(size, size), mode="bilinear", antialias=True)
        if rng.random() < 0.4:
            grey = picture[:, :3].mean(1, keepdim=True)
            picture[:, :3] = grey + (picture[:, :3] - grey) * float(rng.uniform(0.0, 1.5))
            picture[:, :3] = picture[:, :3] * float(rng.uniform(0.8, 1.2)) + float(rng.uniform(-15, 15))
        pictures.append(picture)
    whole = torch.cat(pictures).clamp_(0.0, 255.0)
    return whole[:, :3], whole[:, 3:] / 255.0


def loss_of(maps: tuple[Tensor, ...], alpha: Tensor) -> Tensor:
    """Deep supervision: cross entropy of all seven maps; IoU and L1 of the fused one.

    Args:
        maps: Logits d0 to d6, each (B, 1, H, W).
        alpha: Target, (B, 1, H, W), in [0, 1].
    """
    loss = sum(
        (
            F.binary_cross_entropy_with_logits(logits, alpha) * (1.0 if number == 0 else 0.4)
            for number, logits in enumerate(maps)
        ),
        torch.zeros((), device=alpha.device),
    )
    probability = torch.sigmoid(maps[0])
    overlap = (probability * alpha).sum((1, 2, 3))
    union = (probability + alpha - probability * alpha).sum((1, 2, 3))
    iou = 1.0 - (overlap + 1.0) / (union + 1.0)
    return loss + 0.5 * iou.mean() + 0.5 * (probability - alpha).abs().mean()


def learning_rate(step: int, total: int, peak: float, decay: int) -> float:
    """Linear warm-up over the first steps, the peak, then a straight line down to zero over the last ``decay`` steps.

    Until the descent begins nothing depends on ``total``: a run may be made longer or shorter while it runs, and its
    last command still describes all of it.
    """
    return peak * min(1.0, (step + 1) / _WARM_UP, (total - step) / decay)


def _average(ema: U2Net, model: U2Net, step: int) -> None:
    """Move the averaged weights, and the batch norm statistics, towards the current ones."""
    decay = min(0.995, (1.0 + step) / (20.0 + step))
    with torch.no_grad():
        for slow, fast in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
            if slow.is_floating_point():
                slow.lerp_(fast, 1.0 - decay)


def _validate(model: U2Net, pool: NDArray[np.uint8], size: int, device: torch.device) -> float:
    """Mean IoU at 0.5 over a small pool of scenes that training does not use."""
    scores = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(pool), 8):
            whole = torch.from_numpy(np.array(pool[start : start + 8])).permute(0, 3, 1, 2).float()
            whole = F.interpolate(whole, size=(size, size), mode="bilinear", antialias=True).to(device)
            found, true = model(normalise(whole[:, :3])) > 0.5, whole[:, 3:] > 127.5
            scores += ((found & true).sum((1, 2, 3)) / (found | true).sum((1, 2, 3)).clamp(min=1)).tolist()
    return float(np.mean(scores))


def _steps(stages: tuple[Stage, ...], start: int) -> Iterator[tuple[int, Stage]]:
    number = 0
    for stage in stages:
        for _ in range(stage.steps):
            if number >= start:
                yield number, stage
            number += 1


def train(
    out: Path,
    pool_folder: Path,
    stages: tuple[Stage, ...],
    seed: int,
    peak_rate: float,
    decay: int,
    save_every_s: float = 300.0,
    validation_count: int = 128,
    init: Path | None = None,
    bf16: bool = False,
) -> Path:
    """Train, or continue, one run.

    Args:
        out: Folder of the run: ``checkpoint.pt``, ``loss.csv`` and the averaged weights ``u2netp_demo.safetensors``.
        pool_folder: Folder of the generated scenes.
        stages: What to do at which size.
        seed: Seed of weights, scenes and batches.
        peak_rate: Largest learning rate.
        decay: Steps over which it falls to zero at the end.
        save_every_s: Seconds between checkpoints, each with a validation.
        validation_count: Scenes to validate on.
        init: Weights to start from (.safetensors).
        bf16: Compute the network in bfloat16; weights, batch norm statistics and loss stay float32.

    Returns:
        Path of the averaged weights.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    model, ema = u2netp().to(device), u2netp().to(device)
    if init is not None:
        model.load_state_dict(load_file(init))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema.load_state_dict(model.state_dict())
    # Matrices of one row have no directions to make equal: the side outputs, like all vectors, go to AdamW.
    matrices = [p for p in model.parameters() if p.ndim == 4 and p.shape[0] > 1]
    others = [p for p in model.parameters() if p.ndim != 4 or p.shape[0] == 1]
    optimisers = (Muon(matrices, peak_rate), torch.optim.AdamW(others, lr=peak_rate, weight_decay=1e-4))
    total, first = sum(stage.steps for stage in stages), 0
    checkpoint, weights, log = out / "checkpoint.pt", out / "u2netp_demo.safetensors", out / "loss.csv"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        first = state["step"]
        click.echo(f"continue at step {first} of {total}", err=True)

    validation = build_pool(pool_folder, VALIDATION_SEED, 128, validation_count)
    current: tuple[int, int] | None = None
    began = saved = time.monotonic()
    recent: list[float] = []

    def save(done: int, size: int) -> None:
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "step": done}
        state["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)
        save_file({name: value.contiguous() for name, value in ema.state_dict().items()}, weights)
        score = _validate(ema, validation, max(size, 128), device)
        click.echo(f"step {done}/{total} validation IoU {score:.4f}, {time.monotonic() - began:.0f} s", err=True)
        with log.open("a", newline="") as stream:
            csv.writer(stream).writerow([done, size, "", "", f"{score:.5f}"])

    if not log.exists():
        log.write_text("step,size,learning_rate,loss,validation_iou\n")
    size = stages[-1].size
    for step, stage in _steps(stages, first):
        if current != (stage.pool_size, stage.pool_count):
            current = (stage.pool_size, stage.pool_count)
            pool = build_pool(pool_folder, seed, *current, hard=True)
        size = stage.size
        rate = learning_rate(step, total, peak_rate, decay)
        image, alpha = sample_batch(pool, stage.batch, stage.size, seed, step)
        model.train()
        pixel_values = normalise(image.to(device)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            maps = model.side_logits(pixel_values)
        loss = loss_of(tuple(logits.float() for logits in maps), alpha.to(device))
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        _average(ema, model, step)
        recent.append(loss.item())
        if len(recent) == 20:
            line = [step + 1, size, f"{rate:.6f}", f"{float(np.mean(recent)):.5f}", ""]
            click.echo(f"{line} {time.monotonic() - began:.0f} s", err=True)
            with log.open("a", newline="") as stream:
                csv.writer(stream).writerow(line)
            recent = []
        if time.monotonic() - saved > save_every_s:
            save(step + 1, size)
            saved = time.monotonic()
    save(total, size)
    return weights


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; continued if there.")
@click.option("--pool", "pool_folder", type=click.Path(path_type=Path), required=True, help="Folder of the scenes.")
@click.option("--stage", "stages", multiple=True, default=DEFAULT_STAGES, help="size:batch:steps:pool_size:pool_count")
@click.option("--seed", default=1, show_default=True)
@click.option("--peak-rate", default=2e-3, show_default=True, help="Largest learning rate.")
@click.option("--decay", default=800, show_default=True, help="Steps over which it falls to zero at the end.")
@click.option("--init", type=click.Path(path_type=Path, exists=True), help="Weights to start from (.safetensors).")
@click.option("--bf16", is_flag=True, help="Compute in bfloat16: twice as fast where the processor has it.")
def main(
    out: Path,
    pool_folder: Path,
    stages: tuple[str, ...],
    seed: int,
    peak_rate: float,
    decay: int,
    init: Path | None,
    bf16: bool,
) -> None:
    """Train the demonstration model on generated scenes.

    Example: python -m matteserve_export.demo_model.train --out runs/demo --pool runs/pool
    """
    try:
        parsed = tuple(Stage.parse(text) for text in stages)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    click.echo(str(train(out, pool_folder, parsed, seed, peak_rate, decay, init=init, bf16=bf16)))


if __name__ == "__main__":
    main()
