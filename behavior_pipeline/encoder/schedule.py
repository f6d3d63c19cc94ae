"""The learning rate over a training: warm-up, a plateau, a linear fall to zero."""

from __future__ import annotations

from behavior_pipeline.encoder.configuration import TrainingConfig


def rate_share(step: int, config: TrainingConfig) -> float:
    """Return which share of the full rate a step has, counted from 0.

    Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4.2), the decay linear and to zero
    (Haegele et al. 2024, section 3). Where warm-up and decay overlap the lower one holds.
    """
    warmup = max(1, round(config.max_steps * config.warmup_share))
    decay = max(1, round(config.max_steps * config.decay_share))
    rising = (step + 1) / warmup
    falling = (config.max_steps - step) / decay
    return max(0.0, min(1.0, rising, falling))
