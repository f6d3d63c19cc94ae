from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_builders import CUTOFF, SIZES, VOCABULARY_ID

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import (
    load_checkpoint,
    save_checkpoint,
    write_untrained,
)
from behavior_pipeline.encoder.configuration import EncoderConfig, TrainingConfig
from behavior_pipeline.encoder.train import train
from behavior_pipeline.errors import PipelineError

CONFIG = EncoderConfig.named("tiny", SIZES)


def save(folders, encoder: Encoder, **changes: Any) -> Path:
    given = {"trained_through": CUTOFF, "training": {"history": [{"step": 1.0}]}, **changes}
    return save_checkpoint(encoder, folders.vocabulary, folders.checkpoints, **given)


def test_a_checkpoint_comes_back_bit_for_bit(folders):
    encoder = Encoder(CONFIG)
    encoder.set_prior(torch.rand(CONFIG.width))
    checkpoint = load_checkpoint(save(folders, encoder))
    loaded = checkpoint.encoder.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in encoder.state_dict().items())
    assert not checkpoint.encoder.training
    assert checkpoint.config == CONFIG
    assert checkpoint.trained_through == CUTOFF
    assert checkpoint.vocabulary_id == VOCABULARY_ID
    assert checkpoint.history == [{"step": 1.0}]


def test_the_id_tells_content_apart_and_not_times(folders):
    encoder = Encoder(CONFIG)
    first = save(folders, encoder)
    assert save(folders, encoder, training={"seconds": 12.0}) == first
    assert save(folders, encoder, trained_through=CUTOFF + timedelta(days=1)) != first
    encoder.set_prior(torch.ones(CONFIG.width))
    assert save(folders, encoder) != first


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "vocabulary.json", "tokens.parquet"]
)
def test_a_changed_file_is_refused(folders, name):
    folder = save(folders, Encoder(CONFIG))
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(PipelineError, match="was changed"):
        load_checkpoint(folder)


def test_a_changed_training_cutoff_is_refused(folders):
    folder = save(folders, Encoder(CONFIG))
    about = json.loads((folder / "training.json").read_text())
    about["trained_through"] = (CUTOFF - timedelta(days=9)).isoformat()
    (folder / "training.json").write_text(json.dumps(about))
    with pytest.raises(PipelineError, match="was changed"):
        load_checkpoint(folder)


def test_a_folder_without_weights_is_no_checkpoint(folders):
    folder = save(folders, Encoder(CONFIG))
    (folder / "model.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"lacks model\.safetensors"):
        load_checkpoint(folder)


def test_the_untrained_control_depends_on_the_seed_alone(folders):
    paths = [
        write_untrained(folders.vocabulary, folders.checkpoints, config, seed)
        for config, seed in (("tiny", 1), (CONFIG, 1), ("tiny", 2))
    ]
    assert paths[0] == paths[1] != paths[2]
    checkpoint = load_checkpoint(paths[0])
    assert checkpoint.training["is_untrained"]
    assert checkpoint.trained_through == CUTOFF
    assert not checkpoint.encoder.prior().any()


def test_the_card_tells_what_it_was_trained_on_and_is_not_hashed(folders):
    config = TrainingConfig.named("tiny", max_steps=4, validate_every=2, threads=1)
    summary = train(*folders, config)
    card = (summary.folder / "README.md").read_text()
    losses = summary.history[summary.best_step // 2 - 1]
    for told in (
        f"`{summary.checkpoint_id}`",
        "| users | 59 |",
        "| trained through (exclusive) | 2024-07-01 |",
        f"| vocabulary | {VOCABULARY_ID} |",
        f"| weights kept | of step {summary.best_step}",
        f"| contrastive | 1 | {losses['train_contrastive']:.4g} |",
        "`untrained.json`",
        "event at or after 2024-07-01",
    ):
        assert told in card
    (summary.folder / "README.md").write_text("other words")
    assert load_checkpoint(summary.folder).checkpoint_id == summary.checkpoint_id


def test_the_untrained_control_has_a_card_as_well(folders):
    folder = write_untrained(folders.vocabulary, folders.checkpoints, "tiny", 0)
    card = (folder / "README.md").read_text()
    assert card.startswith("# An untrained control")
    assert "## Training" not in card
    assert "None" not in card
