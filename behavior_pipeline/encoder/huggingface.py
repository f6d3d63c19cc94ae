"""Checkpoints through Hugging Face transformers' front door (an optional dependency).

After `import behavior_pipeline.encoder.huggingface`, a checkpoint folder loads as any model does:

    model = AutoModel.from_pretrained("checkpoints/0123456789abcdef")
    outputs = model(action_ids, property_ids, time_gaps)  # (B, T) each; gaps in days
    outputs["embedding"]  # (B, D)

The model's weights have the names they have in the checkpoint, so that the files are the same. The
content hash is not verified here; `checkpoints.load_checkpoint` does that.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.configuration import MODEL_TYPE, EncoderConfig
from behavior_pipeline.errors import PipelineError

try:
    from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
except ImportError as error:
    raise PipelineError(
        "Hugging Face transformers is not installed.",
        'Install it with `pip install "behavior-pipeline[huggingface]"`.',
    ) from error

__all__ = ["BehaviorEncoderConfig", "BehaviorEncoderModel"]


class BehaviorEncoderConfig(PreTrainedConfig):
    """The fields of `EncoderConfig` beside those that transformers keeps of every model."""

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True  # a vocabulary's sizes have no default

    @classmethod
    def of(cls, config: EncoderConfig) -> BehaviorEncoderConfig:
        """Return the configuration of an encoder of ours."""
        content = config.to_json()
        content.pop("model_type")
        return cls(**content)

    def encoder_config(self) -> EncoderConfig:
        """Return the shape of the encoder.

        Raises:
            PipelineError: if a field of it is missing.
        """
        names = [item.name for item in fields(EncoderConfig)]
        if missing := [name for name in names if not hasattr(self, name)]:
            raise PipelineError(
                f"This is no configuration of a behavioural encoder: it lacks {', '.join(missing)}."
            )
        return EncoderConfig.from_json({name: getattr(self, name) for name in names})


class BehaviorEncoderModel(PreTrainedModel):
    """`Encoder` as a model of transformers: the same modules under the same names."""

    config_class = BehaviorEncoderConfig
    base_model_prefix = ""
    main_input_name = "action_ids"
    config: BehaviorEncoderConfig

    def __init__(self, config: BehaviorEncoderConfig) -> None:
        super().__init__(config)
        # transformers builds models without values and fills in what the file holds. Constants
        # that are in no file (bucket edges, frequencies) have to exist, so the CPU builds it.
        with torch.device("cpu"):
            encoder = Encoder(config.encoder_config())
        _check_root(encoder)
        for name, child in encoder.named_children():
            self.add_module(name, child)
        # Beside the modules, not among them: their names have to be those of the file.
        object.__setattr__(self, "_encoder", encoder)
        object.__setattr__(self, "_constants", _constants(encoder))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder; arguments and result as in `PreTrainedModel.from_pretrained`.

        Raises:
            PipelineError: if the file's weights are not those of the configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        odd = {*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]}
        if odd:
            raise PipelineError(
                f"The weights do not fit config.json: {', '.join(sorted(map(str, odd)))}."
            )
        model.settle()
        return (model, info) if wants_info else model

    @torch.no_grad()
    def settle(self) -> None:
        """Put the constants that no file holds in place, and the weights into memory of their own.

        Weights that lie in the mapped file are not aligned, and then sums round differently than
        in the encoder that was saved.
        """
        for values in (*self.parameters(), *self.buffers()):
            values.data = values.data.clone()
        for name, values in self._constants.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, values.clone().to(self.device))

    def train(self, mode: bool = True) -> BehaviorEncoderModel:
        """Switch between training and evaluation."""
        super().train(mode)
        if "_encoder" in self.__dict__:
            self._encoder.training = mode
        return self

    def forward(
        self, action_ids: Tensor, property_ids: Tensor, time_gaps: Tensor, **more: Any
    ) -> dict[str, Tensor]:
        """Embed histories; arguments and result as in `Encoder.forward`."""
        outputs: dict[str, Tensor] = self._encoder(action_ids, property_ids, time_gaps, **more)
        return outputs

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave weights as `Encoder` made them."""


def _check_root(encoder: Encoder) -> None:
    """Make sure that every weight belongs to a child, so that sharing the children shares all."""
    own = [name for name, _ in encoder.named_parameters(recurse=False)]
    own += [name for name, _ in encoder.named_buffers(recurse=False)]
    if own:
        raise AssertionError(f"the encoder itself holds {', '.join(own)}")


def _constants(encoder: Encoder) -> dict[str, Tensor]:
    """Return the buffers that are in no file."""
    saved = encoder.state_dict().keys()
    return {name: b.clone() for name, b in encoder.named_buffers() if name not in saved}


AutoConfig.register(MODEL_TYPE, BehaviorEncoderConfig, exist_ok=True)
AutoModel.register(BehaviorEncoderConfig, BehaviorEncoderModel, exist_ok=True)
