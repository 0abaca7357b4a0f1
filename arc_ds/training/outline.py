"""The model of a run on the meta device: all shapes, no weights, no file but those with the sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from arc_ds.config.schema import DecoderConfig, RunConfig
from arc_ds.errors import ConfigError
from arc_ds.inference.decoders import read_decoder_sizes
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.training.build_model import compressor_spec, lora_spec
from arc_ds.training.engine import set_trained


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The sizes of a run's model.

    spec: sizes of the compressor.
    decoders: sizes of the trained decoders, in the order of the ports.
    """

    spec: CompressorSpec
    decoders: tuple[BackboneConfig, ...]


def read_outline(config: RunConfig) -> Outline:
    """Read the sizes of the run's backbones.

    Raises WeightsError if sizes cannot be read, and ConfigError if they do not match or a decoder needs transformers.
    """
    for idx, decoder in config.trained_decoders.items():
        if decoder.implementation == "transformers":  # which would also miss the weights
            raise _refusal(idx, decoder)
    spec = compressor_spec(config)
    decoders = []
    for idx, decoder in config.trained_decoders.items():
        sizes = read_decoder_sizes(Path(decoder.backbone), decoder.rope_scaling, implementation=decoder.implementation)
        if not isinstance(sizes, BackboneConfig):
            raise _refusal(idx, decoder)
        decoders.append(sizes)
    return Outline(spec=spec, decoders=tuple(decoders))


def _refusal(idx: int, decoder: DecoderConfig) -> ConfigError:
    return ConfigError(
        f"decoders.{idx} ({decoder.name}) runs through transformers, whose activations arc-ds plan cannot trace. Plan "
        "with a decoder of about its size that our transformer computes."
    )


def build_compressor_outline(config: RunConfig, outline: Outline, dtype: torch.dtype) -> Compressor:
    """The compressor on "meta", with `requires_grad` as in the run. Raises ConfigError if sizes do not match."""
    try:
        with torch.device("meta"):
            compressor = build_compressor(
                outline.spec,
                activation_checkpointing=config.encoder.activation_checkpointing,
                lora=lora_spec(config.encoder.lora),
            )
    except ValueError as error:
        raise ConfigError(f"the config's sizes do not match: {error}") from error
    set_trained(compressor.encoder, **config.encoder.trained_parts)
    return compressor.to(dtype)


def build_decoder_outline(config: RunConfig, outline: Outline, idx: int, dtype: torch.dtype) -> Decoder:
    """One of the run's trained decoders on "meta". idx: of its port."""
    decoder = list(config.trained_decoders.values())[idx]
    with torch.device("meta"):
        return Decoder(outline.decoders[idx], activation_checkpointing=decoder.activation_checkpointing).to(dtype)
