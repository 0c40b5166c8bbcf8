"""Muon: momentum whose update of each weight matrix is made orthogonal.

Method: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale of the update, which
lets it share AdamW's learning rate, is that of Liu et al. 2025, arXiv 2502.16982. ``torch.optim.Muon`` takes matrices
only; here a convolution's weight is one, of shape (out, in * height * width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonal"]


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns, by Newton and Schulz's iteration.

    Args:
        matrix: Shape (M, N), float.
        rounds: Iterations; after five the singular values lie about between 0.7 and 1.2.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Optimiser of the weights of convolutions and linear layers.

    Args:
        params: Parameters of two or more dimensions; the first is the output's.
        lr: Learning rate, of AdamW's magnitude.
        momentum: Of Nesterov's kind.
        weight_decay: Decoupled, as AdamW's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move the parameters. A closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                update = (parameter.grad + group["momentum"] * average).flatten(1)
                update = orthogonal(update) * (0.2 * max(update.shape) ** 0.5)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"])
