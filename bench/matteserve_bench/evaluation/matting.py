"""How far a matte is from the true one: SAD, MSE, gradient and connectivity error.

As defined by Rhemann et al., A Perceptually Motivated Online Benchmark for Image Matting, CVPR 2009
(https://doi.org/10.1109/CVPR.2009.5206503), in the scales and with the constants that papers have used since Xu et al.,
Deep Image Matting, CVPR 2017: sums are divided by 1000, connectivity has steps of 0.1 and no weight by distance.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_SIGMA = 1.4
_CUT_OFF = 1e-2  # the filter ends where the Gaussian falls below it
_STEPS = 10  # of connectivity, from 0 to 1
_THETA = 0.15  # distances below it do not count as disconnected

Alpha = NDArray[np.float32]


def matting_errors(alpha: Alpha, true: Alpha, where: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """All errors of one matte, smaller is better.

    Args:
        alpha: Alpha in question, shape (H, W), float32 in [0, 1].
        true: True alpha, same shape, dtype and range.
        where: Pixels that count, shape (H, W); None takes all. A trimap's unknown region, in the benchmark.

    Returns:
        `sad` (sum of absolute differences / 1000), `mse` and `mad` (mean squared and mean absolute difference x 1000),
        `grad` (gradient error / 1000), `conn` (connectivity error / 1000).
    """
    difference = _counted(np.abs(alpha - true), where).astype(np.float64)
    return {
        "sad": float(difference.sum()) / 1000,
        "mse": float(np.square(difference).mean()) * 1000,
        "mad": float(difference.mean()) * 1000,
        "grad": float(_counted(_gradient_difference(alpha, true), where).sum(dtype=np.float64)) / 1000,
        "conn": float(_counted(_connectivity_difference(alpha, true), where).sum(dtype=np.float64)) / 1000,
    }


def _counted(values: Alpha, where: NDArray[np.bool_] | None) -> Alpha:
    return values.ravel() if where is None else values[where]


def _gradient_difference(alpha: Alpha, true: Alpha) -> Alpha:
    """Squared difference of the gradients' magnitudes, by first derivatives of a Gaussian."""
    difference: Alpha = np.square(_gradient_magnitude(alpha) - _gradient_magnitude(true))
    return difference


def _gradient_magnitude(alpha: Alpha) -> Alpha:
    half = math.ceil(_SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * _SIGMA * _CUT_OFF)))
    x = np.arange(-half, half + 1)
    smooth = np.exp(-(x**2) / (2 * _SIGMA**2))
    slope = -x * smooth
    # Their outer product has unit energy, which makes constant factors of both vanish.
    smooth, slope = smooth / np.linalg.norm(smooth), slope / np.linalg.norm(slope)

    def along(axis: int) -> Alpha:
        smoothed = ndimage.convolve1d(alpha, smooth, axis=1 - axis, mode="nearest")
        derivative: Alpha = ndimage.convolve1d(smoothed, slope, axis=axis, mode="nearest")
        return derivative

    return np.hypot(along(0), along(1))


def _connectivity_difference(alpha: Alpha, true: Alpha) -> Alpha:
    """Absolute difference of the degrees to which pixels are connected to what both mattes hold for the object."""
    connected = np.ones_like(true)  # the highest level at which a pixel belongs to the source region
    undecided = np.ones(true.shape, np.bool_)
    for step in range(1, _STEPS + 1):
        level = np.float32(step / _STEPS)
        outside = undecided & ~_largest_region((alpha >= level) & (true >= level))
        connected[outside] = (step - 1) / _STEPS
        undecided &= ~outside

    def degree(matte: Alpha) -> Alpha:
        distance = matte - connected
        return 1 - np.where(distance >= _THETA, distance, np.float32(0))

    difference: Alpha = np.abs(degree(alpha) - degree(true))
    return difference


def _largest_region(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 4-connected region; of equal ones the first. Empty if there is none."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the background
    region: NDArray[np.bool_] = labels == sizes.argmax()
    return region
