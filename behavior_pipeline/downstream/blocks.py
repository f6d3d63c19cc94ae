"""Columns that probes read, and random ones as a control; needs numpy, Arrow and scipy alone.

A representation is a tuple of blocks, because kinds of columns need different care: RFM is
heavy-tailed and a handful of columns, a vector is many columns of like scale.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import ndtri


@dataclass(frozen=True, eq=False)
class Block:
    """Columns that are normalized alike; a block is equal to itself alone.

    Attributes:
        kind: "rfm" or "aggregates" for heavy-tailed columns, few or many; "vector" for dimensions
            of like scale.
        values: (N, F) numbers.
    """

    kind: Literal["rfm", "aggregates", "vector"]
    values: NDArray[np.float64] | NDArray[np.float32]


Blocks = tuple[Block, ...]


def random_vectors(
    user_ids: pa.Array, cutoff: datetime, width: int, seed: int
) -> NDArray[np.float32]:
    """Return (N, D) standard normal numbers, each user's drawn from a hash of seed, cutoff and id.

    A user's vector does not depend on who else is asked for. It differs between cutoffs, so that a
    probe cannot recognise a user whose label it has seen: the control's AUROC is .5 by design, and
    anything else means that the measurement is broken.
    """
    salt = f"{seed}:{cutoff.isoformat()}:".encode()
    digests = (
        hashlib.shake_256(salt + user.encode()).digest(4 * width) for user in user_ids.to_pylist()
    )
    integers = np.frombuffer(b"".join(digests), dtype="<u4").reshape(-1, width)
    uniform = (integers.astype(np.float64) + 0.5) / 2.0**32
    normal: NDArray[np.float32] = ndtri(uniform).astype(np.float32)
    return normal


def take(blocks: Blocks, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Blocks:
    """Return the blocks of some of the users; the very same blocks where that is everyone."""
    if rows.dtype == np.bool_ and rows.all():
        return blocks
    return tuple(Block(block.kind, block.values[rows]) for block in blocks)


def stack(blocks: Blocks) -> NDArray[np.float64]:
    """Return the (N, F) columns of all blocks side by side."""
    return np.hstack([block.values.astype(np.float64) for block in blocks])
