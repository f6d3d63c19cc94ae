"""What an encoder and its training look like: dataclasses with a comment per field, and presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Any, Final

from behavior_pipeline.contracts import NUM_SPECIAL_IDS
from behavior_pipeline.errors import PipelineError

PRESETS: Final = ("tiny", "small", "base")
OPTIMIZERS: Final = ("muon", "adamw")
PRECISIONS: Final = ("auto", "float32", "autocast", "bfloat16")
ATTENTIONS: Final = ("auto", "blocks", "varlen", "flex")
MODEL_TYPE: Final = "behavior-encoder"
"""What config.json calls the model, so that other programs know which class reads it."""
NORMS: Final = ("rms", "layer")
FEEDFORWARDS: Final = ("squared_relu", "gelu", "swiglu")

TOKEN_STEP: Final = 64
"""Both parts of a batch hold a multiple of so many tokens, if the whole does."""

MIN_STEPS: Final = 100
"""Few data are passed over as often as this takes: a warm-up alone teaches nothing."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; with the weights it is all that is needed to embed a user.

    What an event consists of is declared by four mappings: categorical fields (a table of ids
    each), numbers (a table of buckets each), code vectors (a table per place of the vector), and
    whether the gap since the event before is encoded.
    """

    field_sizes: Mapping[str, int]  # ids per categorical field, the special ids 0 to 3 included
    number_edges: Mapping[str, tuple[float, ...]] = field(
        default_factory=dict
    )  # per numeric field the inner edges of its buckets, rising
    code_sizes: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # per code vector the ids at each of its places, the special ids included
    event_field: str = "action"  # the field that every event has: PAD in it means no event
    has_gap: bool = True  # whether the time since the event before is encoded
    width: int = 128  # D: width of hidden states and of the embedding
    num_layers: int = 3  # transformer blocks
    num_heads: int = 4  # attention heads; width / num_heads is a multiple of 4
    feedforward_width: int = 512  # inner width of a block's feed-forward part
    max_events: int = 128  # T: newest events that the transformer reads
    wide_table_width: int = 64  # width of the fields' tables, which a projection widens
    dropout: float = 0.1  # share of activations dropped in training
    time_window_days: float = 90.0  # longest period of the sinusoids over gaps and silence
    num_time_buckets: int = 48  # learned log-spaced buckets of gaps and of silence
    num_sinusoids: int = 16  # sine and cosine pairs over the time window
    recent_days: float = 30.0  # decay time of the recency-weighted pooling
    norm: str = "rms"  # rms or layer: what normalises before each part of a block
    feedforward: str = "squared_relu"  # squared_relu, gelu or swiglu, all of equal FLOPs
    has_query_key_norm: bool = True  # whether queries and keys are normalised per head
    has_biases: bool = False  # whether the linear layers of the blocks have biases

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built.

        Raises:
            ValueError: naming the field at fault.
        """
        if self.event_field not in self.field_sizes:
            raise ValueError(f"field_sizes lacks {self.event_field}")
        self._check_fields()
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise ValueError("width / num_heads must be a multiple of 4")
        if min(self.num_layers, self.max_events, self.num_time_buckets) < 1:
            raise ValueError("num_layers, max_events and num_time_buckets must be at least 1")
        if self.norm not in NORMS or self.feedforward not in FEEDFORWARDS:
            raise ValueError(f"norm is one of {NORMS}, feedforward one of {FEEDFORWARDS}")

    def _check_fields(self) -> None:
        """Refuse fields that leave no room for an id, or that stand under one name twice."""
        sizes = [(name, size) for name, size in self.field_sizes.items()]
        sizes += [(name, size) for name, sizes in self.code_sizes.items() for size in sizes]
        if small := sorted({name for name, size in sizes if size < NUM_SPECIAL_IDS}):
            raise ValueError(f"sizes of {', '.join(small)} leave no room for the special ids")
        for name, edges in self.number_edges.items():
            if list(edges) != sorted(set(edges)):
                raise ValueError(f"number_edges of {name} do not rise")
        names = [*self.field_sizes, *self.number_edges, *self.code_sizes]
        if len(set(names)) < len(names):
            raise ValueError("a name stands for two fields")

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
                "num_sinusoids": 32, "dropout": 0.0,
            },
        }  # fmt: skip
        _check_preset(name)
        return cls(**{"field_sizes": dict(field_sizes), **shapes[name], **changes})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, and what kind of model they describe."""
        content: dict[str, Any] = {"model_type": MODEL_TYPE}
        content |= {item.name: getattr(self, item.name) for item in fields(self)}
        content["field_sizes"] = dict(self.field_sizes)
        for name in ("number_edges", "code_sizes"):
            content[name] = {key: list(values) for key, values in content[name].items()}
        return content

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
        tuples = {
            name: {key: tuple(values) for key, values in content[name].items()}
            for name in ("number_edges", "code_sizes")
        }
        return cls(**{**content, **tuples})


@dataclass(frozen=True)
class ObjectiveWeights:
    """What each objective counts in the sum that training minimises; 0 switches it off."""

    masked_event: float = 0.5  # fill in hidden events from both sides
    next_event: float = 0.5  # action, category, item and time of the next event
    contrastive: float = 1.0  # two time windows of one user resemble each other
    silence: float = 0.5  # from the readout at a random cutoff: what comes, and when
    future_window: float = 0.0  # from the same readout: what occurs within each of `future_days`


@dataclass(frozen=True)
class TrainingConfig:
    """How an encoder is trained."""

    preset: str = "small"  # shape of the encoder: tiny, small or base
    seed: int = 0  # every random choice derives from it
    max_steps: int = 700  # optimiser steps at the most
    max_passes: float = 3.5  # passes over the events at the most, but at least MIN_STEPS steps
    batch_tokens: int = 4096  # tokens of a batch: histories, what follows, masked copies
    accumulate: int = 1  # micro-batches of each process in a step
    optimizer: str = "muon"  # of the blocks' matrices: muon or adamw; AdamW for all the rest
    learning_rate: float = 2e-3  # of AdamW at the end of warm-up
    muon_learning_rate: float = 5e-3  # of Muon at the end of warm-up, on AdamW's scale
    warmup_share: float = 0.1  # share of the steps in which the rate rises
    decay_share: float = 0.5  # last share of the steps, in which the rate falls to 0
    weight_decay: float = 0.05  # of matrices; none on biases, norms and tables
    gradient_norm: float = 1.0  # gradients are clipped to this norm
    ema_decay: float = 0.99  # of the averaged weights; 0 keeps none
    precision: str = "auto"  # float32, autocast or bfloat16; auto: bfloat16 on a GPU
    compile: bool | None = None  # whether torch.compile is used; None: on a GPU
    horizon_days: float = 30.0  # how far ahead the readout at a cutoff learns to look
    cutoff_share: float = 0.5  # last share of the training period in which cutoffs are drawn
    cutoffs_per_user: int = 3  # cutoffs read out from one pass over a user's events
    mask_share: float = 0.15  # share of events hidden by the masked-event objective
    mask_levels: tuple[float, float, float] = (0.0, 1.0, 0.0)
    # ^ shares of the copies in which a field, an event, or all events of a type are hidden at once
    masked_row_share: float = 0.25  # masked copies beside the other tokens of a batch
    max_future_events: int = 48  # events of a contrastive window after the cutoff
    alignment: str = "contrast"  # contrastive objective: contrast, or cosine without negatives
    temperature: float = 0.1  # of the contrast
    hardness: float = 0.0  # of the contrast: how much near negatives count more (contrast.py: beta)
    positive_share: float = 0.0  # of its negatives that are positives in disguise (tau)
    robust_share: float = 0.0  # next action: how far from the mean to the worst mix (dro.py)
    robust_level: float = 1.0  # of the worst mix: eps of the most frequent action
    robust_tail_power: float = 0.6  # how much larger the uncertainty set of rare actions is
    future_days: tuple[float, ...] = (7.0, 28.0)  # horizons of the future window, shortened alike
    predicted_fields: Mapping[str, float] = field(
        default_factory=lambda: {"action": 1.0, "category": 0.5, "item": 0.5}
    )  # what the fields of a predicted event count; those that an encoder lacks are left out
    max_full_softmax: int = 2000  # values up to which a field is predicted by an exact softmax
    num_negatives: int = 256  # values sampled where a vocabulary has more
    max_window_targets: int = 512  # lowest ids predicted as a set from a cutoff, per field
    validation_share: float = 0.05  # share of users kept for validation, by a hash of their id
    validate_every: int = 50  # steps between validations
    max_validation_users: int = 512  # validation users at the most
    patience: int = 6  # validations without a better loss before training stops
    shuffle_users: int = 16_384  # users in the shuffle buffer: what is in memory at once
    prefetch: int = 4  # micro-batches made ahead by a thread; 0 makes them in the loop
    log_every: int = 10  # steps between looks at the meters, each of which waits for the device
    save_every: int = 100  # steps between training states on disk; 0 writes none
    threads: int | None = None  # of torch on a CPU; part of what makes a run repeatable
    attention: str = "auto"  # what attends on a GPU: blocks, varlen or flex (layouts.KERNELS)
    device: str = "auto"  # cpu, cuda or auto
    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            ValueError: naming the field at fault.
        """
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}")
        if min(self.accumulate, self.validate_every, self.log_every) < 1:
            raise ValueError("accumulate, validate_every and log_every must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError("ema_decay must be at least 0 and below 1")
        if min(self.warmup_share, self.decay_share) < 0:
            raise ValueError("warmup_share and decay_share must not be negative")

    @classmethod
    def named(cls, name: str, **changes: Any) -> TrainingConfig:
        """Return the training that suits the encoder preset of that name; None changes nothing.

        Raises:
            PipelineError: if there is no such preset.
        """
        _check_preset(name)
        plans: dict[str, dict[str, Any]] = {
            "tiny": {"max_steps": 20, "batch_tokens": 768, "validate_every": 10},
            "small": {},
            "base": {
                "max_steps": 10_000, "max_passes": 20.0, "batch_tokens": 131_072,
                "learning_rate": 3e-4, "max_future_events": 128, "masked_row_share": 0.5,
                "num_negatives": 4096, "validate_every": 250, "max_validation_users": 4096,
                "shuffle_users": 131_072, "muon_learning_rate": 7.5e-4, "ema_decay": 0.999,
                "save_every": 500,
            },
        }  # fmt: skip
        given = {key: value for key, value in changes.items() if value is not None}
        return replace(cls(preset=name, **plans[name]), **given)

    @property
    def masked_tokens(self) -> int:
        """Tokens of a batch that attend both ways: masked copies of the others."""
        share = self.masked_row_share if self.weights.masked_event else 0.0
        return round(self.batch_tokens * share / (1 + share) / TOKEN_STEP) * TOKEN_STEP

    @property
    def causal_tokens(self) -> int:
        """Tokens of a batch that attend causally: each event of a user once."""
        return self.batch_tokens - self.masked_tokens

    def for_events(self, num_events: int, num_processes: int = 1) -> TrainingConfig:
        """Return the configuration with no more steps than `max_passes` over the events take."""
        step_tokens = self.causal_tokens * self.accumulate * num_processes
        needed = math.ceil(self.max_passes * num_events / step_tokens)
        return replace(self, max_steps=min(self.max_steps, max(MIN_STEPS, needed)))

    def for_device(self, kind: str) -> TrainingConfig:
        """Return the configuration with what a kind of device, cpu or cuda, decides."""
        is_gpu = kind == "cuda"
        precision = ("bfloat16" if is_gpu else "float32") if self.precision == "auto" else ""
        return replace(
            self,
            precision=precision or self.precision,
            compile=is_gpu if self.compile is None else self.compile,
            attention=gpu_attention() if is_gpu and self.attention == "auto" else self.attention,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def gpu_attention() -> str:
    """Return what attends on a GPU where nothing else was asked for: our kernels, given Triton."""
    return "blocks" if find_spec("triton") else "varlen"


def _check_preset(name: str) -> None:
    """Refuse a preset that does not exist."""
    if name not in PRESETS:
        raise PipelineError(
            f"There is no encoder preset '{name}'.", f"Use one of {', '.join(PRESETS)}."
        )
