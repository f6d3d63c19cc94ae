"""Where the time of a step goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 3
ROWS = 25
NAME_WIDTH = 96


class Cost(NamedTuple):
    """What all calls of one kernel cost in a step.

    Attributes:
        name: of the kernel; on a CPU of the operation.
        milliseconds: in the kernel itself.
        calls: how often it runs.
    """

    name: str
    milliseconds: float
    calls: float


def profiled(step: Callable[[], object], device: torch.device) -> list[Cost]:
    """Return what each kernel costs in a warm step, the dearest first; the mean of three."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if is_gpu:
            torch.cuda.synchronize(device)
    return costs(found.key_averages(), is_gpu=is_gpu)


def costs(averages: Iterable[Any], *, is_gpu: bool) -> list[Cost]:
    """Return the costs of kernels, or on a CPU of operations, among a profile's averages."""
    kind = DeviceType.CUDA if is_gpu else DeviceType.CPU
    # Annotations span kernels, and the waits between them.
    kept = [
        each
        for each in averages
        if each.device_type == kind and not getattr(each, "is_user_annotation", False)
    ]
    times = [each.self_device_time_total if is_gpu else each.self_cpu_time_total for each in kept]
    found = [
        Cost(each.key, time / 1000 / STEPS, each.count / STEPS)
        for each, time in zip(kept, times, strict=True)
        if time
    ]
    return sorted(found, key=lambda cost: -cost.milliseconds)


def table(found: list[Cost]) -> str:
    """Return the dearest kernels in lines, and what all of them cost together."""
    total = sum(cost.milliseconds for cost in found)
    lines = [f"{'ms/step':>9} {'share':>6} {'calls':>6}  kernel"]
    lines += [
        f"{cost.milliseconds:9.3f} {cost.milliseconds / total:6.1%} {cost.calls:6.0f}  "
        f"{cost.name[:NAME_WIDTH]}"
        for cost in found[:ROWS]
    ]
    lines.append(f"{total:9.3f} {1:6.1%} {sum(cost.calls for cost in found):6.0f}  all")
    return "\n".join(lines)
