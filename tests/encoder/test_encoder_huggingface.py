from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoder_builders import Folders
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import behavior_pipeline.encoder.huggingface  # noqa: F401 - registers the classes
from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import load_checkpoint, write_untrained
from behavior_pipeline.encoder.configuration import MODEL_TYPE, EncoderConfig
from behavior_pipeline.encoder.huggingface import BehaviorEncoderConfig, BehaviorEncoderModel
from behavior_pipeline.errors import PipelineError


@pytest.fixture
def checkpoint(folders: Folders) -> Path:
    return write_untrained(folders.vocabulary, folders.checkpoints, "tiny", 0)


def snippet(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The usage snippet of BEAT's model card, with ids that the test's vocabulary has."""
    action_ids = torch.tensor([[4, 5, 6, 7, 4, 6, 5, 7]])
    property_ids = torch.tensor([[11, 4, 4, 4, 8, 5, 9, 9]])
    time_gaps = torch.tensor([[0.0, 0.1, 0.5, 1.2, 3.0, 3.1, 7.0, 7.5]])
    with torch.no_grad():
        return model(action_ids, property_ids, time_gaps)


def test_auto_model_opens_a_checkpoint_folder_as_it_is(checkpoint):
    model = AutoModel.from_pretrained(str(checkpoint), trust_remote_code=False)
    outputs = snippet(model)
    assert outputs["embedding"].shape == (1, model.config.width)
    expected = snippet(load_checkpoint(checkpoint).encoder)
    for name, value in expected.items():
        assert torch.equal(outputs[name], value), name
    assert not model.training


def test_opening_changes_nothing_in_the_folder(checkpoint):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    AutoModel.from_pretrained(checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert load_checkpoint(checkpoint).checkpoint_id == checkpoint.name


def test_saving_and_opening_again_keeps_every_bit(checkpoint, tmp_path):
    model = AutoModel.from_pretrained(checkpoint)
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        model = AutoModel.from_pretrained(tmp_path / name)
    weights = [
        load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "twice")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    expected = snippet(load_checkpoint(checkpoint).encoder)
    assert torch.equal(snippet(model)["embedding"], expected["embedding"])


def test_configurations_turn_into_each_other(checkpoint):
    ours = load_checkpoint(checkpoint).config
    theirs = AutoConfig.from_pretrained(checkpoint)
    assert isinstance(theirs, BehaviorEncoderConfig)
    assert theirs.encoder_config() == ours
    assert BehaviorEncoderConfig.of(ours).encoder_config() == ours
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == MODEL_TYPE


def test_a_model_from_a_configuration_has_the_encoders_first_weights(checkpoint):
    config = load_checkpoint(checkpoint).config
    torch.manual_seed(3)
    model = AutoModel.from_config(BehaviorEncoderConfig.of(config))
    torch.manual_seed(3)
    encoder = Encoder(config)
    assert isinstance(model, BehaviorEncoderModel)
    assert model.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in model.state_dict().items())


def test_it_trains_and_moves_as_any_module(checkpoint):
    model = AutoModel.from_pretrained(checkpoint).train()
    assert model._encoder.training
    assert all(part.training for part in model.modules())
    gaps = torch.ones(2, 3)
    ids = torch.full((2, 3), 5)
    model(ids, ids, gaps)["embedding"].sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 10


def test_weights_that_do_not_fit_are_refused(checkpoint, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_layers": 3}))
    with pytest.raises(PipelineError, match="do not fit"):
        AutoModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE, "width": 48}))
    with pytest.raises(PipelineError, match="lacks"):
        AutoModel.from_pretrained(folder)


def test_other_content_is_no_configuration_of_ours(checkpoint):
    content = load_checkpoint(checkpoint).config.to_json()
    assert EncoderConfig.from_json(content).to_json() == content
    older = {name: value for name, value in content.items() if name != "model_type"}
    assert EncoderConfig.from_json(older).to_json() == content
    with pytest.raises(ValueError, match="describes a bert"):
        EncoderConfig.from_json({**content, "model_type": "bert"})


def test_without_transformers_it_says_what_to_install():
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import behavior_pipeline.encoder.huggingface"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "behavior-pipeline[huggingface]" in done.stderr


def test_the_encoder_itself_needs_no_transformers():
    program = (
        "import sys, behavior_pipeline.encoder.train, behavior_pipeline.encoder.inference\n"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
