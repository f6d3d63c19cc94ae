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

FUSED_PARTS: Final = {"query_key_value": 3}
"""How many matrices the weight of a layer of that name holds, one below the other."""

_BETAS: Final = (0.9, 0.98)


class Optimizer:
    """Updates the parameters of a model.

    Matrices of the blocks may be kept in bfloat16 (precision `bfloat16`): then the optimizer holds
    a float32 master of each, updates that one, and rounds it into the model.

    Args:
        model: its block matrices are converted to bfloat16 if the configuration says so.
        config: optimizer, rates, decay, clipping.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.matrices = [name for name in self.parameters if self._is_block_matrix(name)]
        self.masters = self._make_masters()
        is_muon = config.optimizer == "muon"
        self.by_muon = self.matrices if is_muon else []
        self.muon = Muon([self.masters[n] for n in self.by_muon], list(map(_parts, self.by_muon)))
        self.by_adamw = [name for name in self.parameters if name not in set(self.by_muon)]
        self.adamw = self._make_adamw(model)

    def _is_block_matrix(self, name: str) -> bool:
        """Tell whether a parameter is a matrix of a transformer block."""
        return BLOCKS in name and self.parameters[name].ndim == 2  # noqa: PLR2004 - a matrix

    def _make_masters(self) -> dict[str, Tensor]:
        """Return what is updated in float32, by name: the parameters, or masters of them."""
        masters: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        if self.config.precision == "bfloat16":
            for name in self.matrices:
                masters[name] = masters[name].float().clone()
                self.parameters[name].data = masters[name].bfloat16()
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
        norm = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), self.config.gradient_norm, foreach=True
        )
        share = rate_share(step, self.config)
        self._step_adamw(share * self.config.learning_rate)
        self._step_muon(share * self.config.muon_learning_rate)
        self._round()
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def _step_adamw(self, rate: float) -> None:
        for name in self.by_adamw:
            gradient = self.parameters[name].grad
            self.masters[name].grad = None if gradient is None else gradient.float()
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
        """Bring the model's bfloat16 matrices up to date with their masters."""
        if self.config.precision == "bfloat16":
            rounded: list[Tensor] = [self.parameters[name].data for name in self.matrices]
            torch._foreach_copy_(rounded, [self.masters[name] for name in self.matrices])

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


def _parts(name: str) -> int:
    """Return how many matrices the parameter of a name holds."""
    return next((parts for layer, parts in FUSED_PARTS.items() if f".{layer}." in name), 1)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; zeros if the batch had no use for it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
