"""One training on several processes, one a GPU, as `torchrun` starts them.

A step's global batch is the micro-batches of all processes. Its loss is the mean of their losses,
each counted by its number of events: sum_m n_m L_m / sum_m n_m. Every process adds its part to the
gradients, divided by the sum over all; so two processes with one micro-batch each and one process
with two do the same arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TRAINING, VALIDATION = 0, 1
"""Kinds of micro-batches, so that the two draw from different random streams."""

_BUCKET_MEGABYTES: Final = 25


@dataclass(frozen=True)
class Processes:
    """The processes of a training, and which of them this one is.

    Attributes:
        rank: this process, from 0.
        count: how many there are.
        device: where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def is_parallel(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum of a tensor over all processes, the same on each."""
        if self.is_parallel:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked by rank."""
        if not self.is_parallel:
            return values[None]
        found = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(found, values)
        return torch.stack(found)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.is_parallel:
            dist.barrier()

    def agree(self, value: float) -> float:
        """Return the first process's value, so that all decide alike."""
        if not self.is_parallel:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def agree_on(self, text: str, length: int) -> str:
        """Return the first process's text, `length` ASCII characters."""
        if not self.is_parallel:
            return text
        shared = torch.tensor(list(text.encode().ljust(length)), device=self.device)
        dist.broadcast(shared, src=0)
        return bytes(shared.tolist()).decode()


def pick_device(name: str) -> torch.device:
    """Return the device that a name means; `auto` prefers a GPU, under torchrun this process's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', torch.cuda.current_device())}"
    return torch.device(name)


@contextmanager
def joining(device_name: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; alone without it.

    NCCL between GPUs, gloo between CPUs.
    """
    device = pick_device(device_name)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device if is_gpu else None)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def seed_for(seed: int, kind: int, number: int) -> int:
    """Return the seed of the random streams of one micro-batch, counted over all processes.

    Random numbers are thus a function of the micro-batch alone: neither what ran before matters,
    nor which process takes it, nor whether the training was interrupted.
    """
    return int(np.random.SeedSequence([seed, kind, number]).generate_state(1, np.uint64)[0] >> 1)


class _TouchAll(torch.autograd.Function):
    """Passes a loss on and reaches every parameter in the backward pass, with no gradient.

    A batch may have no use for a head (no pair to contrast, say). The reducer must hear of every
    parameter all the same: one that got no gradient counts as zero.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        """Return the loss as it is."""
        ctx.num_parameters = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the loss's gradient on, and none to the parameters."""
        return (gradients[0], *[None] * ctx.num_parameters)


class Model(nn.Module):
    """The encoder and its objectives as one module, from a batch to its losses."""

    def __init__(self, encoder: nn.Module, objectives: nn.Module, *, is_parallel: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.objectives = objectives
        self.is_parallel = is_parallel

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return the loss of each objective, and their weighted sum under `total`."""
        losses: dict[str, Tensor] = dict(self.objectives(self.encoder, batch))
        if self.is_parallel and torch.is_grad_enabled():
            losses["total"] = _TouchAll.apply(  # type: ignore[no-untyped-call]
                losses["total"], *self.parameters()
            )
        return losses


def compile_passes(model: Model, *, is_replayed: bool = False) -> None:
    """Compile a pass as one graph, with several processes as well.

    Gradients are then summed after the backward pass rather than during it. That is what graphs
    that end where a bucket of gradients is full are for (`optimize_ddp`), but between GPUs of one
    host the sums take less time than what such pieces lose, and products slow down beside them.

    Args:
        model: whose objectives are compiled.
        is_replayed: whether the kernels of a pass are recorded and replayed as a whole (a CUDA
            graph), for passes so short that starting their kernels takes longer than they do. A
            pass then writes its gradients where the one before wrote its own.
    """
    torch._dynamo.config.optimize_ddp = not model.is_parallel  # noqa: SLF001 - its only place
    model.objectives.compile(mode="reduce-overhead" if is_replayed else None)


class Reducer:
    """Runs a model's backward passes and leaves the gradients of the global batch behind.

    The gradients are summed over the processes bucket by bucket while the backward pass of the last
    micro-batch goes on.
    """

    def __init__(self, model: Model, processes: Processes) -> None:
        self.model = model
        self.processes = processes
        self.replica = _replicate(model, processes) if processes.is_parallel else model

    def shares(self, weights: Sequence[float]) -> list[float | Tensor]:
        """Return what each of this process's micro-batches counts in the global batch.

        With several processes these are tensors on the device, so that no process waits, and they
        are multiplied by the number of processes, by which the reducer divides.
        """
        if not self.processes.is_parallel:
            total = sum(weights)
            return [weight / total for weight in weights]
        own = torch.tensor(list(weights), dtype=torch.float32)
        own = own.to(self.processes.device, non_blocking=True)
        return list((own * self.processes.count / self.processes.sum(own.sum())).unbind())

    def passes(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch's passes: gradients are summed in the last alone."""
        if isinstance(self.replica, DistributedDataParallel) and not is_last:
            context: AbstractContextManager[None] = self.replica.no_sync()
            return context
        return nullcontext()


def _replicate(model: Model, processes: Processes) -> DistributedDataParallel:
    """Wrap a model so that its gradients are averaged while they are made.

    The graph is not declared static: the reducer would then leave out for good, without a word,
    what the first batch had no use for. `_TouchAll` makes looking for such parameters needless.
    """
    is_gpu = processes.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[processes.device] if is_gpu else None,
        broadcast_buffers=False,
        bucket_cap_mb=_BUCKET_MEGABYTES,
        gradient_as_bucket_view=True,
    )
