"""How tokens that lie flat, (N, D), belong to users and attend to each other.

Everything in the transformer but attention treats every token alike, so it runs on flat tokens; a
layout alone knows where a user's events begin and end. `PaddedLayout` is a rectangle of users by
places; `PackedLayout` has users' runs one after another in a fixed budget of tokens, the first part
of which attends causally and the rest both ways.

Legend of shapes: N tokens, R runs, B users, T places, H heads, W width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from behavior_pipeline.encoder.run_attention import BLOCK, Stretches

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

Ints = NDArray[np.int64]

KERNELS: Final = ("blocks", "varlen", "flex")
"""What attends inside runs on a GPU: our own kernels, whose tiles hold several short runs; torch's
flash attention of variable length, a tile or more for each run and head; or flex attention."""

FLEX_BLOCK: Final = 128
"""Tokens of a block of flex attention's mask."""

ARRANGED_IN: Final = {"blocks": BLOCK, "flex": FLEX_BLOCK}
"""Per kernel the tokens of the blocks that as few runs as possible should straddle."""

# torch 2.10 has a flag for causal attention, later releases have a window instead.
_HAS_WINDOW = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters
_SHORT_PRECISIONS = (torch.bfloat16, torch.float16)  # all that flash attention computes in


class Layout(Protocol):
    """Who attends to whom."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values by attention inside each user; all (N, H, W)."""

    def stretches_for(self, whole: Tensor) -> Stretches | None:
        """Return what each token sees, if our own kernels are to attend with such numbers."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Layout:
        """Return the layout on a device."""


@dataclass(frozen=True)
class PaddedLayout:
    """B users of T places each, one after another: N = B x T.

    Attributes:
        lengths: events of each user, (B,) int64.
        num_places: T.
        is_causal: whether an event sees only itself and those before, or all of its user's.
    """

    lengths: Tensor
    num_places: int
    is_causal: bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values by attention inside each user; all (N, H, W).

        Padding stands behind the events: attending causally, no event sees it.
        """
        shape = len(self.lengths), self.num_places, *query.shape[1:]
        mask = None if self.is_causal else self._key_mask()
        q, k, v = (part.view(shape).transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal)
        return mixed.transpose(1, 2).reshape(query.shape)

    def stretches_for(self, whole: Tensor) -> Stretches | None:  # noqa: ARG002 - a layout's
        """Return nothing: torch's attention serves."""
        return None

    def _key_mask(self) -> Tensor:
        """Return which keys may be attended to, (B, 1, 1, T); the first one always."""
        places = torch.arange(self.num_places, device=self.lengths.device)
        return (places < self.lengths.clamp(min=1)[:, None])[:, None, None, :]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PaddedLayout:
        """Return the layout on a device."""
        return replace(self, lengths=self.lengths.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Group:
    """Runs of like lengths, for attention on a CPU.

    Attributes:
        tokens: the token at each place of each run, (rows, L) int64; beyond a run any token.
        lengths: tokens of each run, (rows,) int64.
    """

    tokens: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Runs:
    """Part of a packed batch: users' runs and then filler, all of which attend in one way.

    Attributes:
        offsets: where each run begins and the last one ends, (R + 1,) int32. R never changes
            between batches, so that nothing is compiled twice: what is left of the tokens is cut
            into filler runs, what is left of R is runs of no token.
        max_length: no run is longer.
        is_causal: whether an event sees only itself and those before, or all of its user's.
        num_tokens: N.
        groups: the runs without the filler by like lengths; used on a CPU and left there.
        order: each token's place in the groups laid flat, the place after them for filler, (N,).
        kernel: what attends on a GPU, one of KERNELS.
        mask: blocks that attend to each other, where the kernel needs them.
    """

    offsets: Tensor
    max_length: int
    is_causal: bool
    num_tokens: int
    groups: tuple[Group, ...]
    order: Tensor
    kernel: str = "varlen"
    mask: BlockMask | None = None

    @classmethod
    def of(
        cls,
        lengths: Ints,
        num_tokens: int,
        num_runs: int,
        max_length: int,
        *,
        is_causal: bool,
        kernel: str = "varlen",
    ) -> Runs:
        """Lay out runs of the given lengths in `num_tokens` tokens.

        Args:
            lengths: tokens of each run, at most `num_runs` of them; 0 is allowed.
            num_tokens: tokens of the part, filler included.
            num_runs: runs of the part, those of the filler not counted.
            max_length: no run is longer, nor is one of the filler.
            is_causal: how they attend.
            kernel: what attends on a GPU, one of KERNELS.

        Raises:
            ValueError: if the runs do not fit, or there is no such kernel.
        """
        if kernel not in KERNELS:
            raise ValueError(f"kernel is one of {KERNELS}")
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        if total > num_tokens or len(lengths) > num_runs or (lengths > max_length).any():
            raise ValueError(f"{len(lengths)} runs of {total} tokens do not fit in {num_tokens}")
        offsets = np.full(num_runs + -(-num_tokens // max_length) + 1, num_tokens, np.int32)
        offsets[0] = 0
        offsets[1 : len(ends) + 1] = ends
        filler = np.arange(total + max_length, num_tokens, max_length)
        offsets[len(ends) + 1 : len(ends) + 1 + len(filler)] = filler
        groups, order = _group(lengths, ends - lengths, num_tokens)
        return cls(
            torch.from_numpy(offsets), max_length, is_causal, num_tokens, groups, order, kernel
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values by attention inside each run; all (N, H, W)."""
        if self.mask is None and not query.is_cuda:
            return self._attend_in_groups(query, key, value)
        if self.mask is not None or varlen_attn is None or value.dtype not in _SHORT_PRECISIONS:
            return self.attend_by_mask(query, key, value)
        return self.attend_by_lengths(query, key, value)

    def attend_by_lengths(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Do the same through torch's flash attention of variable length, on a GPU."""
        how: dict[str, Any] = {"is_causal": self.is_causal}
        if _HAS_WINDOW:
            how = {"window_size": (-1, 0 if self.is_causal else -1)}
        offsets, longest = self.offsets, self.max_length
        mixed = varlen_attn(query, key, value, offsets, offsets, longest, longest, **how)
        assert isinstance(mixed, Tensor)  # noqa: S101 - no auxiliary output was asked for
        return mixed

    def attend_by_mask(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Do the same through flex attention, which skips blocks of nobody's pairs."""
        parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
        # Uncompiled it would lay out all N x N scores.
        is_alone = query.is_cuda and not torch.compiler.is_compiling()
        attend = torch.compile(flex_attention) if is_alone else flex_attention
        mask = self.block_mask() if self.mask is None else self.mask
        mixed = attend(parts[0], parts[1], parts[2], block_mask=mask)
        assert isinstance(mixed, Tensor)  # noqa: S101 - no auxiliary output was asked for
        return mixed[0].transpose(0, 1)

    def block_mask(self) -> BlockMask:
        """Return which blocks of tokens attend to which, from where the runs begin and end.

        A block's tokens see tokens from the begin of the first one's run to the end of the last
        one's: one stretch of blocks, so that no N x N pairs need be looked at.
        """
        device, num_blocks = self.offsets.device, -(-self.num_tokens // FLEX_BLOCK)
        tokens = torch.arange(self.num_tokens, device=device, dtype=torch.int32)
        run = torch.searchsorted(self.offsets, tokens, right=True) - 1
        blocks = torch.arange(num_blocks, device=device)
        begin = self.offsets[run[blocks * FLEX_BLOCK]] // FLEX_BLOCK
        last = (blocks * FLEX_BLOCK + FLEX_BLOCK - 1).clamp(max=self.num_tokens - 1)
        end = blocks if self.is_causal else (self.offsets[run[last] + 1] - 1) // FLEX_BLOCK
        seen = (begin[:, None] + blocks).clamp(max=num_blocks - 1)

        def may_attend(_batch: Tensor, _head: Tensor, left: Tensor, right: Tensor) -> Tensor:
            is_same = run[left] == run[right]
            return is_same & (left >= right) if self.is_causal else is_same

        return BlockMask.from_kv_blocks(
            (end - begin + 1)[None, None].int(),
            seen[None, None].int(),
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=may_attend,
            seq_lengths=(self.num_tokens, self.num_tokens),
        )

    def _attend_in_groups(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Pad runs of like lengths, attend, and put the results back; filler gets zeros."""
        mixed = [
            _attend_padded(query, key, value, group, is_causal=self.is_causal)
            for group in self.groups
        ]
        nothing = query.new_zeros(1, *query.shape[1:])
        return torch.cat((*mixed, nothing)).index_select(0, self.order)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Runs:
        """Return the runs on a device; anywhere but on a CPU the groups are of no use."""
        if torch.device(device).type == "cpu":
            return self
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        moved = replace(self, offsets=offsets, groups=(), order=offsets.new_zeros(0))
        return replace(moved, mask=moved.block_mask()) if self.kernel == "flex" else moved

    def pin_memory(self) -> Runs:
        """Return the runs in memory that a GPU can fetch from while others work."""
        return replace(self, offsets=self.offsets.pin_memory())


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, group: Group, *, is_causal: bool
) -> Tensor:
    """Attend inside the runs of a group; return (rows x L, H, W)."""
    length = group.tokens.shape[1]
    flat = group.tokens.reshape(-1)
    padded = PaddedLayout(group.lengths, length, is_causal)
    return padded.attend(*(part.index_select(0, flat) for part in (query, key, value)))


def _group(lengths: Ints, starts: Ints, num_tokens: int) -> tuple[tuple[Group, ...], Tensor]:
    """Group runs by padded length; return the groups and each token's place in them laid flat."""
    padded = padded_length(lengths)
    groups, base = [], 0
    order = np.empty(num_tokens, np.int64)
    is_filler = np.ones(num_tokens, np.bool_)
    for length in np.unique(padded[lengths > 0]):
        rows = np.flatnonzero((padded == length) & (lengths > 0))
        places = np.arange(length)
        is_event = places < lengths[rows, None]
        tokens = starts[rows, None] + np.where(is_event, places, 0)
        order[tokens[is_event]] = (base + np.arange(tokens.size).reshape(tokens.shape))[is_event]
        is_filler[tokens[is_event]] = False
        base += tokens.size
        groups.append(Group(torch.from_numpy(tokens), torch.from_numpy(lengths[rows])))
    order[is_filler] = base
    return tuple(groups), torch.from_numpy(order)


@dataclass(frozen=True)
class PackedLayout:
    """Runs that attend causally, then runs that attend both ways; one pass serves them all.

    Attributes:
        parts: the runs and how many tokens they hold, in order.
        sizes: tokens of each part; their sum is N.
        stretches: what each token sees, where our own kernels are to attend on a GPU.
    """

    parts: tuple[Runs, ...]
    sizes: tuple[int, ...]
    stretches: Stretches | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[Ints],
        sizes: Sequence[int],
        num_runs: int,
        max_length: int,
        kernel: str = "varlen",
    ) -> PackedLayout:
        """Lay out runs, those of the first part causally, those of a second one both ways.

        Args:
            lengths: for each part as in `Runs.of`.
            sizes: tokens of each part.
            num_runs: as in `Runs.of`.
            max_length: as in `Runs.of`.
            kernel: what attends on a GPU, one of KERNELS.
        """
        parts = [
            Runs.of(each, size, num_runs, max_length, is_causal=number == 0, kernel=kernel)
            for number, (each, size) in enumerate(zip(lengths, sizes, strict=True))
        ]
        stretches = Stretches.of_runs(lengths, sizes) if kernel == "blocks" else None
        return cls(tuple(parts), tuple(sizes), stretches)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values by attention inside each run; all (N, H, W)."""
        if len(self.parts) == 1:
            return self.parts[0].attend(query, key, value)
        whole = (query, key, value)
        split = zip(*(torch.split(part, list(self.sizes)) for part in whole), strict=True)
        return torch.cat([runs.attend(*qkv) for runs, qkv in zip(self.parts, split, strict=True)])

    def stretches_for(self, whole: Tensor) -> Stretches | None:
        """Return what each token sees, if our own kernels are to attend with such numbers."""
        return self.stretches if whole.is_cuda else None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedLayout:
        """Return the layout on a device."""
        parts = tuple(runs.to(device, non_blocking=non_blocking) for runs in self.parts)
        stretches = self.stretches
        if stretches is not None:
            stretches = stretches.to(device, non_blocking=non_blocking)
        return replace(self, parts=parts, stretches=stretches)

    def pin_memory(self) -> PackedLayout:
        """Return the layout in memory that a GPU can fetch from while others work."""
        stretches = None if self.stretches is None else self.stretches.pin_memory()
        parts = tuple(runs.pin_memory() for runs in self.parts)
        return replace(self, parts=parts, stretches=stretches)


def padded_length(lengths: Ints, max_events: int | None = None) -> Ints:
    """Return the length that each length is padded to: 8, 12, 16, 24, 32 and so on.

    Args:
        lengths: lengths, any shape.
        max_events: the longest allowed; longer ones are cut to it.
    """
    steps = np.array([size for power in range(3, 31) for size in (2**power, 3 * 2 ** (power - 1))])
    if max_events is not None:
        steps = np.append(steps[steps < max_events], max_events)
        lengths = np.minimum(lengths, max_events)
    return steps[np.searchsorted(steps, lengths)]
