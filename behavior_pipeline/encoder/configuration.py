"""What an encoder and its training look like: dataclasses with a comment per field, and presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from behavior_pipeline.contracts import NUM_SPECIAL_IDS, TOKEN_FIELDS
from behavior_pipeline.errors import PipelineError

PRESETS: Final = ("tiny", "small", "base")
MODEL_TYPE: Final = "behavior-encoder"
"""What config.json calls the model, so that other programs know which class reads it."""

MIN_STEPS: Final = 100
"""Few data are passed over as often as this takes: a warm-up alone teaches nothing."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; with the weights it is all that is needed to embed a user."""

    field_sizes: Mapping[str, int]  # ids per token field, the special ids 0 to 3 included
    width: int = 128  # D: width of hidden states and of the embedding
    num_layers: int = 3  # transformer blocks
    num_heads: int = 4  # attention heads; width / num_heads is a multiple of 4
    feedforward_width: int = 512  # inner width of a block's feed-forward part
    max_events: int = 128  # T: newest events that the transformer reads
    wide_table_width: int = 64  # width of the item and category tables before projection
    dropout: float = 0.1  # share of activations dropped in training
    time_window_days: float = 90.0  # longest period of the sinusoids over gaps and silence
    num_time_buckets: int = 48  # learned log-spaced buckets of gaps and of silence
    num_sinusoids: int = 16  # sine and cosine pairs over the time window
    recent_days: float = 30.0  # decay time of the recency-weighted pooling

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built.

        Raises:
            ValueError: naming the field at fault.
        """
        missing = [name for name in TOKEN_FIELDS if name not in self.field_sizes]
        if missing:
            raise ValueError(f"field_sizes lacks {', '.join(missing)}")
        small = [name for name in TOKEN_FIELDS if self.field_sizes[name] < NUM_SPECIAL_IDS]
        if small:
            raise ValueError(f"field_sizes of {', '.join(small)} leave no room for the special ids")
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise ValueError("width / num_heads must be a multiple of 4")
        if min(self.num_layers, self.max_events, self.num_time_buckets) < 1:
            raise ValueError("num_layers, max_events and num_time_buckets must be at least 1")

    @classmethod
    def named(cls, name: str, field_sizes: Mapping[str, int], **changes: Any) -> EncoderConfig:
        """Return the preset `tiny`, `small` or `base` for a vocabulary.

        Raises:
            PipelineError: if there is no such preset.
        """
        shapes: dict[str, dict[str, Any]] = {
            "tiny": {
                "width": 48, "num_layers": 2, "num_heads": 2, "feedforward_width": 96,
                "max_events": 32, "wide_table_width": 16, "num_time_buckets": 16,
                "num_sinusoids": 4,
            },
            "small": {},
            "base": {
                "width": 768, "num_layers": 12, "num_heads": 12, "feedforward_width": 3072,
                "max_events": 256, "wide_table_width": 128, "num_time_buckets": 64,
                "num_sinusoids": 32,
            },
        }  # fmt: skip
        _check_preset(name)
        return cls(**{"field_sizes": dict(field_sizes), **shapes[name], **changes})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, and what kind of model they describe."""
        return {
            **asdict(self),
            "field_sizes": dict(self.field_sizes),
            "model_type": MODEL_TYPE,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EncoderConfig:
        """Read what `to_json` returned; older content does not say the kind of model.

        Raises:
            ValueError: if a field is unknown or missing, or it describes another kind of model.
        """
        content = dict(content)
        if (found := content.pop("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ValueError(f"config.json describes a {found}, not a {MODEL_TYPE}")
        known = {item.name for item in fields(cls)}
        if set(content) != known:
            odd = sorted(set(content) ^ known)
            raise ValueError(f"config.json has unknown or missing fields: {', '.join(odd)}")
        return cls(**content)


@dataclass(frozen=True)
class ObjectiveWeights:
    """What each objective counts in the sum that training minimises; 0 switches it off."""

    masked_event: float = 0.5  # fill in hidden events from both sides
    next_event: float = 0.5  # action, category, item and time of the next event
    contrastive: float = 1.0  # two time windows of one user resemble each other
    silence: float = 0.5  # from the readout at a random cutoff: what comes, and when


@dataclass(frozen=True)
class TrainingConfig:
    """How an encoder is trained."""

    preset: str = "small"  # shape of the encoder: tiny, small or base
    seed: int = 0  # every random choice derives from it
    max_steps: int = 700  # optimiser steps at the most
    max_passes: float = 3.5  # passes over the events at the most, but at least MIN_STEPS steps
    batch_tokens: int = 3072  # padded tokens of histories in a step, at the most
    learning_rate: float = 2e-3  # at the end of warm-up
    warmup_share: float = 0.1  # share of the steps in which the rate rises
    weight_decay: float = 0.05  # of matrices; none on biases, norms and tables
    gradient_norm: float = 1.0  # gradients are clipped to this norm
    horizon_days: float = 30.0  # how far ahead the readout at a cutoff learns to look
    cutoff_share: float = 0.5  # last share of the training period in which cutoffs are drawn
    cutoffs_per_user: int = 3  # cutoffs read out from one pass over a user's events
    mask_share: float = 0.15  # share of events hidden by the masked-event objective
    masked_row_share: float = 0.25  # share of a batch's users in the masked-event pass
    max_future_events: int = 48  # events of a contrastive window after the cutoff
    temperature: float = 0.1  # of the contrastive objective
    num_negatives: int = 256  # sampled values where a vocabulary has more than 2,000
    max_window_targets: int = 512  # lowest ids predicted as a set from a cutoff, per field
    validation_share: float = 0.05  # share of users kept for validation, by a hash of their id
    validate_every: int = 50  # steps between validations
    max_validation_users: int = 512  # validation users at the most
    patience: int = 6  # validations without a better loss before training stops
    shuffle_users: int = 16_384  # users in the shuffle buffer: what is in memory at once
    threads: int | None = None  # of torch on a CPU; part of what makes a run repeatable
    device: str = "auto"  # cpu, cuda or auto
    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)

    @classmethod
    def named(cls, name: str, **changes: Any) -> TrainingConfig:
        """Return the training that suits the encoder preset of that name; None changes nothing.

        Raises:
            PipelineError: if there is no such preset.
        """
        _check_preset(name)
        plans: dict[str, dict[str, Any]] = {
            "tiny": {"max_steps": 20, "batch_tokens": 1024, "validate_every": 10},
            "small": {},
            "base": {
                "max_steps": 10_000, "max_passes": 20.0, "batch_tokens": 65_536,
                "learning_rate": 3e-4, "max_future_events": 128, "masked_row_share": 0.5,
                "num_negatives": 4096, "validate_every": 250, "max_validation_users": 4096,
                "shuffle_users": 131_072,
            },
        }  # fmt: skip
        given = {key: value for key, value in changes.items() if value is not None}
        return replace(cls(preset=name, **plans[name]), **given)

    def for_events(self, num_events: int) -> TrainingConfig:
        """Return the configuration with no more steps than `max_passes` over the events take."""
        needed = math.ceil(self.max_passes * num_events / self.batch_tokens)
        return replace(self, max_steps=min(self.max_steps, max(MIN_STEPS, needed)))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def _check_preset(name: str) -> None:
    """Refuse a preset that does not exist."""
    if name not in PRESETS:
        raise PipelineError(
            f"There is no encoder preset '{name}'.", f"Use one of {', '.join(PRESETS)}."
        )
