"""Time as numbers a network can use: log-spaced buckets, sinusoids, and rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from behavior_pipeline.encoder.layers import Linear

SHORTEST_DAYS = 1.0 / 1440.0  # one minute: shorter times share a bucket


def to_bits(numbers: Tensor) -> Tensor:
    """Return float64 numbers as the int64 with the same bits.

    What a module is moved to (bfloat16, say) it moves all its floating-point buffers to. Constants
    that must stay exact are kept as integers, which stay as they are.
    """
    return numbers.double().view(torch.int64)


def from_bits(bits: Tensor) -> Tensor:
    """Return the float64 numbers that `to_bits` was given."""
    return bits.view(torch.float64)


def log_bucket_edges(num_buckets: int, longest_days: float) -> Tensor:
    """Return the `num_buckets - 1` inner edges of log-spaced buckets over (1 minute, longest).

    Bucket 0 holds times up to a minute (a basket's lines share one second), the last bucket
    everything beyond `longest_days`.
    """
    if num_buckets == 1:
        return torch.empty(0)
    ends = math.log(SHORTEST_DAYS), math.log(longest_days)
    return torch.exp(torch.linspace(ends[0], ends[1], num_buckets - 1, dtype=torch.float64)).float()


class TimeEncoding(nn.Module):
    """A time in days as a vector: learned log-spaced buckets plus projected sinusoids.

    The sinusoids' periods run geometrically from 1/24 day to the window (90 days), as in Vaswani
    et al. 2017, section 3.5, with real time in the place of the position; beyond the window the
    buckets, which reach to four windows, still tell times apart.

    Args:
        width: D, width of the vector.
        num_buckets: number of learned buckets.
        num_sinusoids: number of sine and cosine pairs.
        window_days: longest period.
    """

    edges: Tensor
    frequencies: Tensor

    def __init__(
        self, width: int, num_buckets: int, num_sinusoids: int, window_days: float
    ) -> None:
        super().__init__()
        self.buckets = nn.Embedding(num_buckets, width)
        self.sinusoids = Linear(2 * num_sinusoids, width, bias=False)
        periods = torch.exp(
            torch.linspace(
                math.log(1 / 24), math.log(window_days), num_sinusoids, dtype=torch.float64
            )
        )
        edges = log_bucket_edges(num_buckets, 4 * window_days)
        self.register_buffer("edges", to_bits(edges), persistent=False)
        self.register_buffer("frequencies", to_bits(2 * math.pi / periods), persistent=False)

    def bucket_of(self, days: Tensor) -> Tensor:
        """Return the bucket (same shape, int64) of each time in days."""
        return torch.bucketize(days.double().contiguous(), from_bits(self.edges))

    def waves(self, days: Tensor) -> Tensor:
        """Return sines and cosines (..., 2 x num_sinusoids) of times (...), as the weights are."""
        angles = days.float().unsqueeze(-1) * from_bits(self.frequencies).float()
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.sinusoids.weight.dtype)

    def forward(self, days: Tensor) -> Tensor:
        """Encode times (...) in days as (..., D)."""
        vector: Tensor = self.buckets(self.bucket_of(days)) + self.sinusoids(self.waves(days))
        return vector


class RotaryClock(nn.Module):
    """Angles for rotary attention (Su et al. 2021) over place and over time.

    The first half of a head's pairs turns with the place in the sequence, the second half with the
    days since the first event that is read, so that attention knows both how many events and how
    many days lie between two events.

    Args:
        head_width: width of one attention head, a multiple of 4.
    """

    place_frequencies: Tensor
    day_frequencies: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        pairs = head_width // 4
        steps = torch.arange(pairs, dtype=torch.float64) / pairs
        self.register_buffer("place_frequencies", to_bits(10_000.0**-steps), persistent=False)
        # Periods from half a day to some four years.
        day_periods = 0.5 * 3000.0**steps
        self.register_buffer(
            "day_frequencies", to_bits(2 * math.pi / day_periods), persistent=False
        )

    def forward(self, places: Tensor, elapsed_days: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (N, 1, head_width / 2), float32.

        Args:
            places: place of each event in its user's events, (N,).
            elapsed_days: days from its user's first event that is read, (N,) float64.
        """
        turn: tuple[Tensor, Tensor] = turn_of(
            places, elapsed_days, self.place_frequencies, self.day_frequencies
        )
        return turn


@torch.library.custom_op(
    "behavior_pipeline::turn_of",
    mutates_args=(),
    schema="(Tensor places, Tensor elapsed_days, Tensor place_bits, Tensor day_bits)"
    " -> (Tensor, Tensor)",
)
def turn_of(
    places: Tensor, elapsed_days: Tensor, place_bits: Tensor, day_bits: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (N, 1, W / 2) float32 of a rotary clock's angles.

    The angles are float64: after ten years the fastest has turned by 50,000, of which float32
    keeps two decimals. That is slow on a GPU, so it is done once a batch: an operation that is
    opaque to torch.compile, which else would compute the angles again in every layer.

    Args:
        places: place of each event in its user's events, (N,).
        elapsed_days: days from its user's first event that is read, (N,) float64.
        place_bits: radians a place of each pair, as `to_bits` has them, (W / 4,).
        day_bits: radians a day likewise.
    """
    by_place = places.double().unsqueeze(-1) * from_bits(place_bits)
    by_day = elapsed_days.double().unsqueeze(-1) * from_bits(day_bits)
    angles = torch.cat((by_place, by_day), dim=-1).remainder(2 * math.pi).float().unsqueeze(-2)
    return angles.cos(), angles.sin()


@turn_of.register_fake
def _turn_shapes(
    places: Tensor, _elapsed_days: Tensor, place_bits: Tensor, day_bits: Tensor
) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes that `turn_of` returns."""
    shape = *places.shape, 1, len(place_bits) + len(day_bits)
    cosines = places.new_empty(shape, dtype=torch.float32)
    return cosines, torch.empty_like(cosines)


def rotate(vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of vectors (N, H, W) by the angles; keep their precision."""
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1)
    return turned.to(vectors.dtype)
