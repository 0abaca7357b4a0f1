"""The model of a run on the meta device: all shapes and no weights. Only the sizes are read from files."""

from __future__ import annotations

import torch

from arc_ds.config.schema import DecoderConfig, RunConfig
from arc_ds.errors import ConfigError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.training.build_model import compressor_spec, decoder_sizes, lora_spec
from arc_ds.training.engine import set_trained


def read_outline(config: RunConfig) -> tuple[CompressorSpec, tuple[BackboneConfig, ...]]:
    """The sizes of the run's compressor and of its trained decoders, in the order of the ports.

    Raises WeightsError if sizes cannot be read, and ConfigError if they do not match or a decoder needs transformers.
    """
    for idx, decoder in config.trained_decoders.items():
        if decoder.implementation == "transformers":  # which would also miss the weights
            raise _refusal(idx, decoder)
    spec = compressor_spec(config)
    decoders = []
    for idx, decoder in config.trained_decoders.items():
        sizes = decoder_sizes(decoder)
        if not isinstance(sizes, BackboneConfig):
            raise _refusal(idx, decoder)
        decoders.append(sizes)
    return spec, tuple(decoders)


def _refusal(idx: int, decoder: DecoderConfig) -> ConfigError:
    return ConfigError(
        f"decoders.{idx} ({decoder.name}) runs through transformers, whose activations arc-ds plan cannot trace. Plan "
        "with a decoder of about its size that our transformer computes."
    )


def build_compressor_outline(config: RunConfig, spec: CompressorSpec, dtype: torch.dtype) -> Compressor:
    """The compressor on "meta", with `requires_grad` as in the run. Raises ConfigError if sizes do not match."""
    try:
        with torch.device("meta"):
            compressor = build_compressor(
                spec,
                activation_checkpointing=config.encoder.activation_checkpointing,
                lora=lora_spec(config.encoder.lora),
            )
    except ValueError as error:
        raise ConfigError(f"the config's sizes do not match: {error}") from error
    set_trained(compressor.encoder, **config.encoder.trained_parts)
    return compressor.to(dtype)


def build_decoder_outline(config: RunConfig, sizes: BackboneConfig, idx: int, dtype: torch.dtype) -> Decoder:
    """One of the run's trained decoders on "meta". idx: of its port."""
    decoder = list(config.trained_decoders.values())[idx]
    with torch.device("meta"):
        return Decoder(sizes, activation_checkpointing=decoder.activation_checkpointing).to(dtype)
