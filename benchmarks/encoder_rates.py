"""How fast something steps: warm-up, then rounds of equal size, each timed as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import cycle

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 4
ROUNDS = 5

Step = Callable[[], int]


def wait(device: torch.device) -> None:
    """Wait for a device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def rates(
    step: Step,
    device: torch.device,
    seconds: float,
    agree: Callable[[int], int] = int,
    warm_up: int = WARM_UP_STEPS,
) -> list[float]:
    """Return what `step` got through per second in each of five rounds.

    Args:
        step: does one step and returns how many events or users it got through.
        device: where the work is.
        seconds: how long all rounds take together, about; one step a round at the least.
        agree: turns a number of steps into that which all processes take.
        warm_up: steps that are not timed.
    """
    for _ in range(warm_up):
        step()
    wait(device)
    began = time.perf_counter()
    step()
    wait(device)
    count = agree(max(1, int(seconds / ROUNDS / (time.perf_counter() - began))))
    return [_round(step, device, count) for _ in range(ROUNDS)]


def _round(step: Step, device: torch.device, count: int) -> float:
    began = time.perf_counter()
    done = sum(step() for _ in range(count))
    wait(device)
    return done / (time.perf_counter() - began)


def precision(device: torch.device, name: str) -> AbstractContextManager[object]:
    """Return the context of a precision: `bf16` autocast, or `fp32`, with TF32 on a GPU."""
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16")


def make_optimizer(modules: Iterable[nn.Module], device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over the modules' weights, in one kernel on a GPU; the same for all."""
    found = {id(p): p for module in modules for p in module.parameters()}
    return torch.optim.AdamW(found.values(), lr=1e-4, fused=device.type == "cuda")


def training_step(
    loss_of: Callable[[int], tuple[Tensor, int]],
    num_batches: int,
    optimizer: torch.optim.Optimizer,
    precision_of: Callable[[], AbstractContextManager[object]],
) -> Step:
    """Return a step that takes the batches in turn: forward, backward, optimizer.

    Args:
        loss_of: the loss of the batch of a number, and how many events it has.
        num_batches: batches, all of them on the device.
        optimizer: of the weights.
        precision_of: makes the context of the forward pass.
    """
    turn = cycle(range(num_batches))

    def step() -> int:
        with precision_of():
            loss, num_events = loss_of(next(turn))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return num_events

    return step
