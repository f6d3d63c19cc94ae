"""In which order runs lie, so that as few as possible straddle the blocks of attention's mask."""

from __future__ import annotations

import numpy as np

from behavior_pipeline.encoder.layouts import Ints


def arranged(lengths: Ints, block: int) -> Ints:
    """Return runs in an order in which blocks of `block` tokens hold whole runs where they can.

    Runs longer than a block begin one, longest first; what is left of a block goes to the longest
    run that fits. Only where none fits does a run straddle, the shortest. Without this nearly every
    block would begin inside a run and be looked at with the block before it as well.

    Args:
        lengths: tokens of each run; runs of no token come last.
        block: tokens of a block.
    """
    waiting = _Waiting(lengths, block)
    order, room = np.empty(len(lengths), np.int64), block
    for place in range(len(lengths)):
        run = waiting.take(room, is_aligned=room == block)
        order[place] = run
        room = (room - int(lengths[run])) % block or block
    return order


class _Waiting:
    """Runs by length; which lengths there are is kept as the bits of a number."""

    def __init__(self, lengths: Ints, block: int) -> None:
        order = np.argsort(lengths, kind="stable")[::-1]
        values = lengths[order]
        self.long = order[values > block][::-1].tolist()
        self.empty = order[values == 0].tolist()
        self.by_length = {
            int(length): order[values == length].tolist()
            for length in np.unique(values[(values > 0) & (values <= block)])
        }
        self.bits = sum(1 << length for length in self.by_length)

    def take(self, room: int, *, is_aligned: bool) -> int:
        """Take the run that comes next where so much of a block is left."""
        if self.long and (is_aligned or not self.bits):
            return int(self.long.pop())
        if not self.bits:
            return int(self.empty.pop())
        fitting = self.bits & ((2 << room) - 1)
        length = fitting.bit_length() - 1 if fitting else (self.bits & -self.bits).bit_length() - 1
        runs = self.by_length[length]
        run = int(runs.pop())
        if not runs:
            self.bits ^= 1 << length
        return run
