"""The card of a checkpoint: what it is, of which data, how it was trained, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from behavior_pipeline.encoder.configuration import EncoderConfig

_USE = """
```python
from pathlib import Path

from behavior_pipeline.encoder.checkpoints import load_checkpoint

encoder = load_checkpoint(Path("{folder}")).encoder
```
"""

_CONTROLS = """
The control is an untrained encoder of the same shape and vocabulary: in this folder's parent,
`untrained.json` names it. What the embeddings are worth beside it, beside RFM and beside random
vectors is in the reports of the nights, `reports/<cutoff>/`.
"""

_LIMITS = """
- It knows no event at or after {trained_through}: to embed a cutoff before that is a leak.
- It reads the newest {max_events} events of a user; of earlier ones it knows their number, the days
  and the visits.
- A value that its vocabulary lacks counts as unknown.
- Embeddings of two checkpoints must not be mixed or compared.
- A user without events gets the mean embedding of the users trained on.
- Users of the training data are in the weights: erasing one means training again.
"""


def model_card(config: EncoderConfig, about: Mapping[str, Any], checkpoint_id: str) -> str:
    """Return the card as Markdown.

    Args:
        config: shape of the encoder.
        about: what `training.json` holds; what it lacks is left out.
        checkpoint_id: of the checkpoint.
    """
    is_untrained = bool(about.get("is_untrained"))
    kind = "An untrained control" if is_untrained else "A behavioural encoder"
    limits = _LIMITS.format(
        trained_through=str(about["trained_through"])[:10], max_events=config.max_events
    )
    sections = {
        "Use": _USE.format(folder=checkpoint_id),
        "Data": _table(_data(about)),
        "Shape": _table(_shape(config, about)),
        "Training": "" if is_untrained else _table(_training(about)),
        "Objectives": _objectives(about),
        "Controls": _CONTROLS,
        "Limits": limits,
    }
    shown = [f"## {title}\n{text.rstrip()}\n" for title, text in sections.items() if text.strip()]
    return f"# {kind}: `{checkpoint_id}`\n\n" + "\n".join(shown)


def _data(about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "users": about.get("num_users"),
        "events": about.get("num_events"),
        "first event": _day(about.get("started_at")),
        "trained through (exclusive)": _day(about["trained_through"]),
        "vocabulary": about.get("vocabulary_id"),
    }


def _shape(config: EncoderConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ", ".join(f"{name} {size:,}" for name, size in config.field_sizes.items())
    return {
        "parameters": about.get("num_parameters"),
        "width of the embedding": config.width,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "events read": config.max_events,
        "ids of each field": sizes,
    }


def _training(about: Mapping[str, Any]) -> dict[str, Any]:
    config = about.get("training_config", {})
    kept = " (moving average)" if about.get("is_averaged") else ""
    names = ("preset", "optimizer", "learning_rate", "muon_learning_rate", "batch_tokens")
    return {
        **{name.replace("_", " "): config.get(name) for name in names},
        "accumulated micro-batches": config.get("accumulate"),
        "steps": about.get("num_steps"),
        "weights kept": f"of step {about.get('best_step')}{kept}",
        "events seen": about.get("num_events_seen"),
        "wall time, minutes": round(float(about.get("seconds", 0.0)) / 60, 1),
        "machine": f"{about.get('num_processes', 1)} x {about.get('device', 'unknown')}",
        "torch": about.get("torch"),
        "seed": about.get("seed"),
    }


def _objectives(about: Mapping[str, Any]) -> str:
    """Return a table of the objectives' weights and losses when the kept weights were met."""
    weights = about.get("training_config", {}).get("weights", {})
    kept = [entry for entry in about.get("history", []) if entry["step"] == about.get("best_step")]
    if not kept:
        return ""
    lines = [
        "",
        "| objective | weight | training loss | validation loss |",
        "| --- | --- | --- | --- |",
    ]
    for key in kept[0]:
        if key.startswith("train_"):
            name = key.removeprefix("train_")
            cells = (
                weights.get(name, ""), kept[0][key], kept[0].get(f"validation_{name}", ""),
            )  # fmt: skip
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _table(rows: Mapping[str, Any]) -> str:
    """Return rows of two columns; those without a value are left out."""
    shown = [
        f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "")
    ]
    return "\n".join(["", "| | |", "| --- | --- |", *shown])


def _cell(value: Any) -> str:
    """Write a value for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _day(moment: Any) -> str | None:
    """Return the day of an ISO time."""
    return None if moment is None else str(moment)[:10]
