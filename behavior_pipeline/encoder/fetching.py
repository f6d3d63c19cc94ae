"""Rows that a device computes, brought to their places in an array while it goes on working."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from behavior_pipeline.encoder.sequence_files import Ints


class Copying(Protocol):
    """A copy to the host that may not have ended yet."""

    def finish(self) -> NDArray[np.float32]:
        """Wait for this copy, for nothing that was asked of the device after it; return it."""


class Fetching:
    """Fetches rows from a device into an array, each batch of them while the next is at work.

    What was added last is in the array only after `finish`.

    Args:
        target: where the rows go, (n, W).
    """

    def __init__(self, target: NDArray[np.float32]) -> None:
        self.target = target
        self._waiting: tuple[Ints | slice, Copying] | None = None

    def add(self, places: Ints | slice, rows: Tensor) -> None:
        """Begin to fetch rows; wait for those of the call before and write them.

        To be called when the device has been given the work that makes `rows`. The call does not
        wait for that work, but for that of the call before, so the device always has some.

        Args:
            places: which rows of the target they are.
            rows: (m, W) on any device, of any precision.
        """
        begun = begin_copy(rows)
        self.finish()
        self._waiting = places, begun

    def finish(self) -> None:
        """Wait for what has not been written yet, and write it."""
        if self._waiting is not None:
            places, copying = self._waiting
            self._waiting = None
            self.target[places] = copying.finish()


class _Done:
    """Rows that can be had at once."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.float().cpu()

    def finish(self) -> NDArray[np.float32]:
        """Return the rows."""
        found: NDArray[np.float32] = self.rows.numpy()
        return found


class _FromGpu:
    """A copy from a GPU into pinned memory, in the order of the stream that made the rows.

    Torch keeps freed pinned memory and gives it out again when no copy uses it any more, so a
    buffer for each batch costs no allocation after the first few.
    """

    def __init__(self, rows: Tensor) -> None:
        self.buffer = torch.empty(rows.shape, dtype=torch.float32, pin_memory=True)
        with torch.cuda.device(rows.device):
            self.buffer.copy_(rows.float(), non_blocking=True)
            self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def finish(self) -> NDArray[np.float32]:
        """Wait for the copy alone and return it; other threads of Python run meanwhile."""
        self.event.synchronize()
        found: NDArray[np.float32] = self.buffer.numpy()
        return found


def begin_copy(rows: Tensor) -> Copying:
    """Begin to copy rows (m, W) to the host as float32."""
    return _FromGpu(rows) if rows.is_cuda else _Done(rows)


def padded_to(values: NDArray[np.float32], num_rows: int, device: torch.device) -> Tensor:
    """Return rows on a device, zeros after them, without waiting for it.

    Args:
        values: (m, ...), m at most `num_rows`.
        num_rows: rows of the result.
        device: where it is wanted.
    """
    how: dict[str, Any] = {"dtype": torch.float32, "pin_memory": device.type == "cuda"}
    filled = torch.empty(num_rows, *values.shape[1:], **how)
    filled[len(values) :] = 0
    # By numpy, which takes arrays that may not be written to as well.
    filled.numpy()[: len(values)] = values
    return filled.to(device, non_blocking=True)
