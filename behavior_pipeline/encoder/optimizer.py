"""One step of learning: Muon on the matrices of the blocks, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from behavior_pipeline.encoder.configuration import TrainingConfig
from behavior_pipeline.encoder.muon import Muon
from behavior_pipeline.encoder.schedule import rate_share

BLOCKS: Final = "blocks."
"""What the name of a transformer block's parameter contains."""

_BETAS: Final = (0.9, 0.98)
_TINY: Final = 1e-6


class Optimizer:
    """Updates the parameters of a model.

    The model may be kept in bfloat16 (precision `bfloat16`): then the optimizer holds a float32
    master of each parameter, updates that one, and rounds it into the model.

    Args:
        model: its parameters, float32, are converted to bfloat16 if the configuration says so.
        config: optimizer, rates, decay, clipping.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.masters = self._make_masters()
        is_muon = config.optimizer == "muon"
        self.by_muon = [name for name in self.parameters if is_muon and self._is_for_muon(name)]
        self.muon = Muon(
            [self.masters[n] for n in self.by_muon], [_parts(model, n) for n in self.by_muon]
        )
        self.by_adamw = [name for name in self.parameters if name not in set(self.by_muon)]
        self.adamw = self._make_adamw(model)

    def _is_for_muon(self, name: str) -> bool:
        """Tell whether a parameter is a matrix of a transformer block."""
        return BLOCKS in name and self.parameters[name].ndim == 2  # noqa: PLR2004 - a matrix

    def _make_masters(self) -> dict[str, Tensor]:
        """Return what is updated in float32, by name: the parameters, or masters of them."""
        masters: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        if self.config.precision == "bfloat16":
            masters = {name: master.clone() for name, master in masters.items()}
            for name, parameter in self.parameters.items():
                parameter.data = masters[name].bfloat16()
        return masters

    def _make_adamw(self, model: nn.Module) -> torch.optim.AdamW:
        """Decay the weights of linear layers; leave tables, norms, gains and biases alone."""
        linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
        decayed = [n for n in self.by_adamw if id(self.parameters[n]) in linear]
        others = [n for n in self.by_adamw if id(self.parameters[n]) not in linear]
        groups = [
            {"params": [self.masters[n] for n in names], "weight_decay": decay}
            for names, decay in ((decayed, self.config.weight_decay), (others, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=_BETAS, fused=True)

    def step(self, step: int) -> Tensor:
        """Clip the gradients, update the model, forget the gradients.

        Args:
            step: counted from 0; decides the rates.

        Returns:
            The norm of the gradients before they were clipped, a scalar on the device: nothing here
            waits for it.
        """
        norm = self._clip()
        share = rate_share(step, self.config)
        self._step_adamw(share * self.config.learning_rate)
        self._step_muon(share * self.config.muon_learning_rate)
        self._round()
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """Scale the gradients down to the norm allowed; return the norm that they had, float32."""
        found = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch._foreach_norm(found, 2, torch.float32)  # noqa: SLF001 - of all at once
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        share = (self.config.gradient_norm / (norm + _TINY)).clamp(max=1.0)
        # Of the gradients' own type: else each is multiplied by a kernel of its own.
        torch._foreach_mul_(found, share.to(found[0].dtype))
        return norm

    def _step_adamw(self, rate: float) -> None:
        found = {name: self.parameters[name].grad for name in self.by_adamw}
        gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
        if gradients and self.config.precision == "bfloat16":
            short = list(gradients.values())
            gradients = {name: torch.empty_like(self.masters[name]) for name in gradients}
            torch._foreach_copy_(list(gradients.values()), short)  # all at once
        for name, gradient in gradients.items():
            self.masters[name].grad = gradient
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        for name in self.by_adamw:
            self.masters[name].grad = None

    def _step_muon(self, rate: float) -> None:
        if self.by_muon:
            gradients = [_gradient(self.parameters[name]) for name in self.by_muon]
            self.muon.step(gradients, rate, self.config.weight_decay)

    @torch.no_grad()
    def _round(self) -> None:
        """Bring a bfloat16 model up to date with its masters."""
        if self.config.precision == "bfloat16":
            rounded: list[Tensor] = [parameter.data for parameter in self.parameters.values()]
            torch._foreach_copy_(rounded, list(self.masters.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the masters and the state of both optimizers under names."""
        found = {f"masters/{name}": master for name, master in self.masters.items()}
        found |= {f"muon/{name}": tensor for name, tensor in self.muon.tensors().items()}
        for name in self.by_adamw:
            state = self.adamw.state.get(self.masters[name], {})
            found |= {f"adamw/{key}/{name}": value for key, value in state.items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned, and bring the model up to date."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"masters/{name}"])
        self.muon.load(_below("muon/", tensors))
        for name in self.by_adamw:
            device = self.masters[name].device
            self.adamw.state[self.masters[name]] = {
                key: tensors[f"adamw/{key}/{name}"].to(device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adamw/{key}/{name}" in tensors
            }
        self._round()


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _parts(model: nn.Module, name: str) -> int:
    """Return how many matrices a parameter holds, one below the other."""
    module, layer, _ = name.rsplit(".", 2)
    if layer == "query_key_value":
        return 3
    is_gated = getattr(model.get_submodule(module), "kind", "") == "swiglu"
    return 2 if layer == "widen" and is_gated else 1


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; zeros if the batch had no use for it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
