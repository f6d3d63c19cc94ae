"""What a training measures of itself: losses, rates, throughput, memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.parallel import Processes
from behavior_pipeline.encoder.training_batches import TrainingBatch

PEAK_FLOPS: Final = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense bfloat16 (float16 where there is none) operations a second, from the vendor's data sheets,
by a part of the device's name; the first that fits."""


class Work(NamedTuple):
    """What a training step on a batch computes.

    Attributes:
        tokens: real tokens that go through the transformer: events and masked copies, no filler.
        flops: floating-point operations of the model, forward and backward.
    """

    tokens: int
    flops: float


def work_of(encoder: Encoder, batch: TrainingBatch) -> Work:
    """Return the work of a training step on a batch, which must be on a CPU.

    The backward pass costs twice the forward pass. Heads, pooling and readout are left out, and so
    is what is spent on filler.
    """
    causal, both_ways = batch.run_lengths()
    forward = encoder.flops_per_pass(causal, causal=True)
    forward += encoder.flops_per_pass(both_ways, causal=False)
    return Work(batch.num_events + batch.num_masked_tokens, 3.0 * forward)


def peak_flops(device: torch.device) -> float | None:
    """Return the operations a second that a device can do at best; None if not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gigabytes(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    try:
        import resource  # noqa: PLC0415 - not everywhere
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class LossSums:
    """Sums of losses over micro-batches, weighted, kept on the device until somebody looks."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], weight: float) -> None:
        """Add the losses of a micro-batch; nothing here waits for the device."""
        if not self.names:
            self.names = list(losses)
            first = next(iter(losses.values()))
            self.sums = torch.zeros(len(losses) + 1, dtype=torch.float64, device=first.device)
        values = [losses[name].detach().double() for name in self.names]
        self.sums += torch.stack([*values, torch.ones_like(values[0])]) * weight

    def means(self) -> tuple[dict[str, float], float]:
        """Return the weighted mean losses over all processes and the weight of all micro-batches.

        Waits for the device. All processes must call it alike.
        """
        if not self.names:
            return {}, 0.0
        *totals, weight = self.processes.sum(self.sums).tolist()
        return {n: total / weight for n, total in zip(self.names, totals, strict=True)}, weight

    def empty_copy(self) -> LossSums:
        """Return sums of nothing, of the same losses."""
        copy = LossSums(self.processes)
        copy.names, copy.sums = self.names, torch.zeros_like(self.sums)
        return copy

    def clear(self) -> None:
        """Begin anew."""
        self.sums = torch.zeros_like(self.sums)

    def tensors(self) -> Tensor:
        """Return the sums of every process, (processes, losses + 1)."""
        return self.processes.gather(self.sums)

    def load(self, names: list[str], tensors: Tensor) -> None:
        """Take back what `tensors` returned, and the names."""
        self.names = list(names)
        self.sums = tensors[self.processes.rank].to(self.processes.device)


class Meters:
    """Counts events, work and time between looks.

    Args:
        processes: whose work is counted.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.peak = peak_flops(processes.device)
        self.restart()

    def restart(self) -> None:
        """Begin a new span of time."""
        self.began = time.perf_counter()
        self.events, self.work = 0, Work(0, 0.0)

    def add(self, num_events: int, work: Work) -> None:
        """Count a micro-batch."""
        self.events += num_events
        self.work = Work(self.work.tokens + work.tokens, self.work.flops + work.flops)

    def look(self) -> dict[str, float]:
        """Return throughput since the last look, and peak memory; begin a new span.

        `events_per_second` and `tokens_per_second` are of all processes, `mfu` (model operations
        over what the devices could do at best: Chowdhery et al. 2022, appendix B) is given where
        the latter is known. To be called after something that waited for the device.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        counts = torch.tensor([self.events, *self.work], dtype=torch.float64)
        events, tokens, flops = self.processes.sum(counts.to(self.processes.device)).tolist()
        found = {
            "events_per_second": events / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gigabytes": peak_memory_gigabytes(self.processes.device),
        }
        if self.peak:
            found["mfu"] = flops / seconds / (self.peak * self.processes.count)
        self.restart()
        return found


class Curves(Protocol):
    """Where scalars of a training go while it runs."""

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Add the values of a step."""

    def close(self) -> None:
        """Write what is left."""


class NoCurves:
    """Keeps nothing."""

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Ignore scalars."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Writes TensorBoard event files."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars; the part of a name before the first underscore groups losses."""
        for name, value in scalars.items():
            group, _, rest = name.partition("_")
            is_loss = group in {"train", "validation"}
            self.writer.add_scalar(f"{group}/{rest}" if is_loss else name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def open_curves(folder: Path | None) -> Curves:
    """Return where curves go: to event files in a folder, if tensorboard is installed.

    A training that was interrupted adds a file; the steps that both hold are the same.
    """
    if folder is None:
        return NoCurves()
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional
    except ImportError:
        return NoCurves()
    return TensorBoard(SummaryWriter(str(folder)))
