"""Checkpoints: weights, configuration, vocabulary and history under a hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load, save
from torch import Tensor

from behavior_pipeline.contracts import COLD_START_USER, TOKEN_FIELDS
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.heads import HEADS
from behavior_pipeline.encoder.model_card import model_card
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import writing_folder

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
TRAINING: Final = "training.json"
VOCABULARY: Final = "vocabulary.json"
TOKENS: Final = "tokens.parquet"
CARD: Final = "README.md"
ID_LENGTH: Final = 16
"""Hex digits of a checkpoint id."""

_HASHED: Final = (WEIGHTS, CONFIG, VOCABULARY, TOKENS, HEADS)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as loaded.

    Attributes:
        encoder: in evaluation mode.
        checkpoint_id: first 16 hex digits of the content hash.
        trained_through: every event that weights or vocabulary know of is before this, in UTC.
        vocabulary_id: content hash of the vocabulary.
        config: shape of the encoder.
        training: all of `training.json`; `history` holds the loss curves.
    """

    encoder: Encoder
    checkpoint_id: str
    trained_through: datetime
    vocabulary_id: str
    config: EncoderConfig
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, float]]:
        """Loss curves: one entry per validation."""
        return list(self.training.get("history", []))


def save_checkpoint(
    encoder: Encoder,
    vocabulary_folder: Path,
    checkpoints_folder: Path,
    trained_through: datetime,
    training: Mapping[str, Any],
    heads: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `<checkpoints_folder>/<checkpoint id>` at once or not at all; return the folder.

    Args:
        encoder: its weights and configuration are kept.
        vocabulary_folder: `vocabulary.json` and `tokens.parquet` are copied from it.
        checkpoints_folder: where checkpoints live.
        trained_through: every event that weights or vocabulary know of is before this.
        training: JSON values that tell how it was trained; neither they nor the card made of
            them are part of the content hash.
        heads: weights of the next-event heads by name, see `heads.py`; none if there are none.
    """
    files = _contents(encoder, vocabulary_folder, heads or {})
    checkpoint_id = _content_hash(files, trained_through)
    folder = checkpoints_folder / checkpoint_id
    if not (folder / TRAINING).exists():
        about = {**training, "trained_through": trained_through.isoformat()}
        with writing_folder(folder) as aside:
            for name, content in files.items():
                (aside / name).write_bytes(content)
            (aside / TRAINING).write_bytes(_json_bytes(about))
            (aside / CARD).write_text(model_card(encoder.config, about, checkpoint_id))
    return folder


def write_untrained(
    vocabulary_folder: Path, checkpoints_folder: Path, config: EncoderConfig | str, seed: int
) -> Path:
    """Write a checkpoint of random weights, the control of every comparison; return its folder.

    Args:
        vocabulary_folder: as in `save_checkpoint`.
        checkpoints_folder: as in `save_checkpoint`.
        config: shape of the encoder, or the name of a preset.
        seed: decides the weights.
    """
    facts = read_vocabulary_facts(vocabulary_folder)
    if isinstance(config, str):
        config = EncoderConfig.named(config, facts.field_sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(config)
    about = {"seed": seed, "is_untrained": True, "history": []}
    return save_checkpoint(
        encoder, vocabulary_folder, checkpoints_folder, facts.trained_through, about
    )


def check_vocabulary(sequences: pa.Table, path: Path, checkpoint: Checkpoint) -> None:
    """Refuse sequences that were tokenized under another vocabulary than the checkpoint's.

    Raises:
        PipelineError: naming the file.
    """
    if pc.any(pc.not_equal(sequences["vocabulary_id"], checkpoint.vocabulary_id)).as_py():
        raise PipelineError(
            f"{path.name} was tokenized under another vocabulary than that of the checkpoint "
            f"{checkpoint.checkpoint_id}, which is {checkpoint.vocabulary_id}.",
            "Tokenize with the vocabulary that is kept in the checkpoint's folder.",
        )


def check_no_reserved_user(sequences: pa.Table, path: Path) -> None:
    """Refuse sequences of a user with the id under which the prior is published.

    Raises:
        PipelineError: naming the file.
    """
    if pc.index(sequences["user_id"], COLD_START_USER).as_py() >= 0:
        raise PipelineError(
            f"{path.name} has a user '{COLD_START_USER}'; that id is reserved.",
            "Give this user another id in the source.",
        )


def load_checkpoint(folder: Path, device: str = "cpu") -> Checkpoint:
    """Load a checkpoint and verify that its content is what its name says.

    Raises:
        PipelineError: if a file is missing, or the content does not match the folder's name.
    """
    missing = [
        name for name in (WEIGHTS, CONFIG, VOCABULARY, TRAINING) if not (folder / name).is_file()
    ]
    if missing:
        raise PipelineError(
            f"{folder} is no checkpoint: it lacks {', '.join(missing)}.", "Train one first."
        )
    training = json.loads((folder / TRAINING).read_text())
    trained_through = datetime.fromisoformat(training["trained_through"])
    files = {name: (folder / name).read_bytes() for name in _HASHED if (folder / name).is_file()}
    if (found := _content_hash(files, trained_through)) != folder.name:
        raise PipelineError(
            f"The checkpoint in {folder} was changed: its content has the id {found}.",
            "Restore it, or train again; what was embedded with it cannot be trusted.",
        )
    config = EncoderConfig.from_json(json.loads(files[CONFIG]))
    encoder = Encoder(config)
    encoder.load_state_dict(load(files[WEIGHTS]))
    return Checkpoint(
        encoder=encoder.eval().to(device),
        checkpoint_id=folder.name,
        trained_through=trained_through,
        vocabulary_id=json.loads(files[VOCABULARY])["vocabulary_id"],
        config=config,
        training=training,
    )


@dataclass(frozen=True)
class VocabularyFacts:
    """What the encoder needs to know of a vocabulary.

    Attributes:
        field_sizes: number of ids per token field, the special ids included.
        vocabulary_id: content hash.
        trained_through: only events before this were counted.
    """

    field_sizes: Mapping[str, int]
    vocabulary_id: str
    trained_through: datetime


def read_vocabulary_facts(vocabulary_folder: Path) -> VocabularyFacts:
    """Read `vocabulary.json`.

    Raises:
        PipelineError: if the folder holds no vocabulary, or a field is missing from it.
    """
    path = vocabulary_folder / VOCABULARY
    if not path.is_file():
        raise PipelineError(
            f"There is no {VOCABULARY} in {vocabulary_folder}.", "Build the vocabulary first."
        )
    content = json.loads(path.read_text())
    if missing := [name for name in TOKEN_FIELDS if name not in content["fields"]]:
        raise PipelineError(f"{path} lacks the fields {', '.join(missing)}.")
    return VocabularyFacts(
        field_sizes={name: int(content["fields"][name]["size"]) for name in TOKEN_FIELDS},
        vocabulary_id=content["vocabulary_id"],
        trained_through=datetime.fromisoformat(content["trained_through"]),
    )


def _contents(
    encoder: Encoder, vocabulary_folder: Path, heads: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """Return the hashed files of a checkpoint by name."""
    files = {
        WEIGHTS: _weights_bytes(encoder.state_dict()),
        CONFIG: _json_bytes(encoder.config.to_json()),
    }
    if heads:
        files[HEADS] = _weights_bytes(heads)
    for name in (VOCABULARY, TOKENS):
        if (vocabulary_folder / name).is_file():
            files[name] = (vocabulary_folder / name).read_bytes()
    return files


def _content_hash(files: Mapping[str, bytes], trained_through: datetime) -> str:
    """Return the first 16 hex digits of a hash over the files and the training cutoff."""
    digest = hashlib.sha256(trained_through.astimezone(UTC).isoformat().encode())
    for name in sorted(files):
        digest.update(f"\n{name} {len(files[name])}\n".encode())
        digest.update(files[name])
    return digest.hexdigest()[:ID_LENGTH]


def _weights_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """Return weights as safetensors."""
    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return bytes(save(kept))


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys."""
    return (json.dumps(content, indent=2, sort_keys=True, default=str) + "\n").encode()
