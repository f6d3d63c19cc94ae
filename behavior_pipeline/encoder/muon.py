"""Muon: momentum whose every matrix is made orthogonal before it is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of the quintic a X + b (X X') X + c (X X')^2 X, chosen by Jordan et al.
2024 ("Muon: an optimizer for hidden layers in neural networks") to be steep at zero: five steps
bring singular values to about [0.7, 1.2], not to 1 exactly."""

NEWTON_SCHULZ_STEPS: Final = 5
MOMENTUM: Final = 0.95

UPDATE_RMS: Final = 0.2
"""Root mean square of an update's entries at rate 1, AdamW's usual one: a rate then means the same
to both (Liu et al. 2025, "Muon is scalable for LLM training", equation 4)."""

_TINY: Final = 1e-7


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return about U V' of each matrix U S V' of a stack (N, R, C), by Newton-Schulz.

    In bfloat16 on a GPU, as its authors do, and in the matrices' own type on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # the Gram matrix of the short side is the small one
    x = x / (x.norm(dim=(1, 2), keepdim=True) + _TINY)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon:
    """Muon over matrices that are updated in place.

    Matrices of one shape are stacked and go through Newton-Schulz together, which is what keeps a
    GPU busy with small ones.

    Args:
        matrices: float32 weights, (R, C) each.
        parts: for each, how many matrices it holds one below the other: a fused projection to
            queries, keys and values is three.
    """

    def __init__(self, matrices: Sequence[Tensor], parts: Sequence[int]) -> None:
        self.parts = list(parts)
        views = [view for each, n in zip(matrices, parts, strict=True) for view in each.chunk(n)]
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for place, view in enumerate(views):
            self.groups.setdefault(tuple(view.shape), []).append(place)
        self.views = views
        self.momenta = {
            shape: views[places[0]].new_zeros(len(places), *shape)
            for shape, places in self.groups.items()
        }

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float, decay: float) -> None:
        """Update the matrices from their gradients, in the order in which they were given.

        M = m M + (1 - m) G; O = orthogonalise of Nesterov's (1 - m) G + m M;
        W = W - rate (decay W + 0.2 sqrt(max(R, C)) O).
        """
        pieces = zip(gradients, self.parts, strict=True)
        flat = [piece for gradient, n in pieces for piece in gradient.chunk(n)]
        for shape, places in self.groups.items():
            stacked = torch.stack([flat[place] for place in places]).float()
            momentum = self.momenta[shape].lerp_(stacked, 1 - MOMENTUM)
            # Laid like the weights: else each is added by a kernel of its own.
            update = orthogonalise(stacked.lerp(momentum, MOMENTUM)).float().contiguous()
            scale = UPDATE_RMS * max(shape) ** 0.5
            weights = [self.views[place] for place in places]
            torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_add_(weights, list(update.unbind()), alpha=-rate * scale)

    def tensors(self) -> dict[str, Tensor]:
        """Return the momenta under names."""
        return {"x".join(map(str, shape)): momentum for shape, momentum in self.momenta.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""
        for name, momentum in self.tensors().items():
            momentum.copy_(tensors[name])
