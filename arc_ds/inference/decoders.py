"""Open a decoder with the implementation that computes it: our packed transformer, or `transformers`."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from arc_ds.errors import UnknownFamilyError, WeightsError
from arc_ds.model.backbone import Recompute
from arc_ds.model.decoder import Decoder
from arc_ds.model.frozen_decoder import DecoderSizes
from arc_ds.model.transformers_files import TransformersFiles, open_with_transformers
from arc_ds.model.weights import BackboneSource, check_fit, load_backbone, open_backbone, read_backbone_config
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.model.weights.locate import locate

logger = logging.getLogger(__name__)

_EMBEDDING = "tok_embeddings.weight"

Implementation = Literal["auto", "native", "transformers"]


@dataclass(frozen=True, kw_only=True)
class NativeFiles:
    """The opened files of a decoder that our packed transformer computes.

    shape: the decoder on the "meta" device.
    tensors: source of its weights.
    """

    shape: Decoder
    tensors: BackboneSource

    @property
    def sizes(self) -> DecoderSizes:
        return self.shape.config

    @property
    def files(self) -> tuple[Path, ...]:
        return locate(self.tensors.path).files

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.shape.parameters())

    def load(
        self, device: torch.device, dtype: torch.dtype, within: AbstractContextManager[Any] | None = None
    ) -> Decoder:
        """Load the decoder, frozen.

        within: `engine.partitioned`, which makes this a collective. By default the decoder is whole on the device.
        """
        decoder = self.shape
        if within is not None:
            with within:
                decoder = Decoder(decoder.config, activation_checkpointing=decoder.activation_checkpointing)
        load_backbone(decoder, self.tensors, dtype=dtype, device=device, name="decoder")
        return decoder.eval()

    def load_embedding(self, device: torch.device, dtype: torch.dtype) -> Decoder:
        """Load what `FrozenDecoder.embed` needs. The other parameters stay on "meta"."""
        is_other = _EMBEDDING.__ne__
        load_backbone(self.shape, self.tensors, dtype=dtype, device=device, skip=is_other, allow_unused=is_other)
        return self.shape.eval()


OpenedDecoder = NativeFiles | TransformersFiles


def open_decoder(
    path: Path,
    rope_scaling: RopeScalingChoice,
    *,
    implementation: Implementation = "auto",
    trust_remote_code: bool = False,
    activation_checkpointing: Recompute = "none",
) -> OpenedDecoder:
    """Open a decoder in a weights folder or a .gguf file. Reads sizes only.

    implementation: "native" for our packed transformer, "transformers" for the model's own code, or "auto": native if
        our readers know the model that the sizes describe, else transformers.
    trust_remote_code: whether transformers may run Python files of the folder.
    activation_checkpointing: activations that backward recomputes. transformers does not take "selective".

    Raises WeightsError if the implementation does not take the decoder. With "auto" the error gives the reasons of
    both, or that of transformers alone if the family is unknown.
    """
    other = _instead_of_native(
        path,
        rope_scaling,
        implementation,
        trust_remote_code=trust_remote_code,
        activation_checkpointing=activation_checkpointing,
    )
    if other is not None:
        opened, reason = other
        logger.info(f"decoder {path} runs through transformers: {reason}")
        return opened
    tensors = open_backbone(path, rope_scaling)
    with torch.device("meta"):
        shape = Decoder(tensors.config, activation_checkpointing=activation_checkpointing)
    check_fit(shape, tensors)
    return NativeFiles(shape=shape, tensors=tensors)


def read_decoder_sizes(
    path: Path,
    rope_scaling: RopeScalingChoice,
    *,
    implementation: Implementation = "auto",
    trust_remote_code: bool = False,
) -> DecoderSizes:
    """The sizes of a decoder. Raises WeightsError like `open_decoder`, but does not check tensors."""
    other = _instead_of_native(path, rope_scaling, implementation, trust_remote_code=trust_remote_code)
    return read_backbone_config(path, rope_scaling) if other is None else other[0].sizes


def _instead_of_native(
    path: Path, rope_scaling: RopeScalingChoice, implementation: Implementation, **options: Any
) -> tuple[TransformersFiles, str] | None:
    """The decoder opened for transformers and the reason for it, or None if it is native.

    The sizes decide: a file that is damaged or missing is an error of the native reader.

    options: of `open_with_transformers`.
    """
    if implementation == "native":
        return None
    if implementation == "transformers":
        return _with_transformers(path, rope_scaling, **options), "its implementation is set to it"
    try:
        read_backbone_config(path, rope_scaling)
        return None
    except WeightsError as error:
        refused = error
    if not (path / "config.json").is_file():
        raise refused
    try:
        opened = _with_transformers(path, rope_scaling, **options)
    except WeightsError as error:
        if str(error) == str(refused):
            raise
        if isinstance(refused, UnknownFamilyError):
            family = Fields.read(path / "config.json").get("model_type")
            raise WeightsError(f"{path}: our own transformer does not compute {family!r}. {error}") from error
        raise WeightsError(
            f"{path} is no decoder that ARC-DS can run. implementation: native says: {refused} implementation: "
            f"transformers says: {error}"
        ) from error
    return opened, f"our own transformer cannot run it. {refused}"


def _with_transformers(
    path: Path,
    rope_scaling: RopeScalingChoice,
    *,
    trust_remote_code: bool,
    activation_checkpointing: Recompute = "none",
) -> TransformersFiles:
    opened = open_with_transformers(
        path, trust_remote_code=trust_remote_code, activation_checkpointing=activation_checkpointing == "full"
    )
    if activation_checkpointing == "selective":
        raise WeightsError(
            f"decoder {path} runs through transformers, where activation_checkpointing: selective is not available. "
            "Set it to full, or to none."
        )
    if rope_scaling != "checkpoint":
        raise WeightsError(
            f"decoder {path} has rope_scaling: {rope_scaling}, but transformers always applies the scaling of the "
            "files. Set rope_scaling: checkpoint, or choose a decoder that implementation: native reads."
        )
    return opened
