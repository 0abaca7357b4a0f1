"""Engines: ZeRO-3 for what is trained, and the placement of a frozen decoder (design 8.1).

DeepSpeed is imported where it is used: inference and export do without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch
from arc_ds.model.backbone import Block
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.encoder import Encoder
from arc_ds.training.optim import PortAdamW

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Placement = Literal["replicated", "zero3", "zero3+hpz"]

# Of a device's free memory that a whole decoder may take: encoder shards, optimizer and activations want the rest.
REPLICATED_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class PlacedDecoder:
    """A frozen decoder where it is used; call it as the `Decoder` itself.

    engine: the ZeRO-3 engine that holds its shards, None where every rank has it whole. It must live as long as the
    module: DeepSpeed takes its hooks off the module when the engine is collected.
    """

    module: Decoder
    engine: DeepSpeedEngine | None = None

    def __call__(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        # Not through the engine: its forward hooks raise in backward where there is no optimizer.
        return self.module(batch, z_ZD)


def set_trained(encoder: Encoder, *, trained_layers: int | None, train_embeddings: bool) -> None:
    """Freeze all of the encoder but its last `trained_layers` layers (None: all) and, if asked, its embeddings.

    Memory tokens are always trained. Before `make_param_groups`.
    """
    encoder.tok_embeddings.requires_grad_(train_embeddings)
    num_frozen = 0 if trained_layers is None else max(len(encoder.layers) - trained_layers, 0)
    for layer_idx, layer in enumerate(encoder.layers):
        layer.requires_grad_(layer_idx >= num_frozen)


def build_engine(compressor: Compressor, optimizer: PortAdamW, ds_config: Mapping[str, Any]) -> DeepSpeedEngine:
    """The ZeRO-3 engine of everything trained; a collective.

    optimizer: over `make_param_groups` of this compressor. ds_config: resolved, nothing "auto", and with
    `zero_allow_untested_optimizer`.
    """
    _open_first_trained_layer(compressor.encoder)
    return _initialize(compressor, ds_config, optimizer)


def port_optimizer(engine: DeepSpeedEngine) -> PortAdamW:
    """The client optimizer inside of ZeRO's."""
    return engine.optimizer.optimizer


def prefetch_is_traced(engine: DeepSpeedEngine) -> bool:
    """Whether ZeRO-3 knows the order of modules by now, and so gathers ahead (design 8.5).

    It records the order in the second pass and loses it for good when a later one differs.
    """
    zero = engine.optimizer
    offload = getattr(zero, "parameter_offload", zero)
    return offload.get_param_coordinator().is_complete_trace()


def choose_placement(
    choice: str, *, decoder_bytes: int, free_bytes: int | None, world_size: int, local_world_size: int | None = None
) -> Placement:
    """What "auto" means: whole on every rank where a copy takes at most 0.4 of the device's free memory.

    Where it does not fit: sharded over all ranks of one host; on several hosts within each host, where a rank's part
    of that copy takes at most the same share, since gathers between hosts are some ten times slower (design 8.1).

    free_bytes: None for a device whose memory is not counted, such as the CPU. local_world_size: ranks on this host;
    default `world_size`. Any other choice is returned as it is.
    """
    if choice != "auto":
        return choice  # type: ignore[return-value]
    if world_size == 1 or free_bytes is None or decoder_bytes <= REPLICATED_SHARE * free_bytes:
        return "replicated"
    local = local_world_size or world_size
    # Groups of another size than 1, and as many ranks in each: what hpZ can be.
    can_be_hpz = 1 < local < world_size and world_size % local == 0
    return "zero3+hpz" if can_be_hpz and decoder_bytes <= REPLICATED_SHARE * free_bytes * local else "zero3"


@contextmanager
def partitioned(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Modules built while it lasts never are whole: each rank makes and keeps its shards; a collective.

    ds_config: of the engine that will hold them. Their values are those that the modules are born with; fill them with
    `weights.load_backbone` and `weights.set_parameter`.
    """
    import deepspeed
    from deepspeed.utils import groups

    with _hpz_groups(_hpz_ranks(ds_config)):
        # The config, not `dtype`, which would give bfloat16 on the CPU whatever it says (DeepSpeed 0.19.8).
        group = groups._get_zero_param_intra_parallel_group()
        with deepspeed.zero.Init(config_dict_or_path=dict(ds_config), zero_param_parallel_group=group):
            yield


def place_decoder(
    decoder: Decoder, placement: Placement, *, device: torch.device | str, ds_config: Mapping[str, Any] | None = None
) -> PlacedDecoder:
    """Put a frozen decoder, whole or built under `partitioned`, where steps use it; a collective.

    ds_config: for the sharded placements, from `config.deepspeed.resolve_decoder_deepspeed` (it says how far hpz goes).
    ValueError where it is missing.
    """
    decoder.requires_grad_(False)
    if placement == "replicated":
        return PlacedDecoder(module=decoder.to(device))
    if ds_config is None:
        raise ValueError(f"a decoder placed {placement!r} needs a DeepSpeed config for its engine")
    engine = _initialize(decoder, ds_config)
    return PlacedDecoder(module=engine.module, engine=engine)


def _initialize(module: nn.Module, ds_config: Mapping[str, Any], optimizer: PortAdamW | None = None) -> DeepSpeedEngine:
    import deepspeed

    # One gather for each layer; and a norm's weight is used by methods that ZeRO-3's hooks do not see.
    deepspeed.utils.set_z3_leaf_modules(module, [Block])
    with _hpz_groups(_hpz_ranks(ds_config)):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
    return engine


def _hpz_ranks(ds_config: Mapping[str, Any]) -> int:
    return ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)


@contextmanager
def _hpz_groups(num_ranks: int) -> Iterator[None]:
    """Give one engine hpZ groups of `num_ranks` ranks (1: none), whatever engines were built before.

    DeepSpeed 0.19 keeps these groups in a global: it shards every engine by what stands there, whatever its config
    says, and cannot make them for an engine without an optimizer (AttributeError).
    """
    from deepspeed.utils import groups

    before = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    try:
        if num_ranks > 1:
            groups._create_zero_param_parallel_group(num_ranks)
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = before


def _open_first_trained_layer(encoder: Encoder) -> None:
    """Let the first trained layer have an input with a gradient, also where all before it is frozen.

    ZeRO-3 reduces a leaf module's gradients and frees its weights when the gradient of its input is done; without one
    it does so before the weights' gradients are made, and backward fails.
    Must come before `deepspeed.initialize`: hooks run in the order of their registration.
    """
    for layer in encoder.layers:
        if any(param.requires_grad for param in layer.parameters()):
            layer.register_forward_pre_hook(_require_input_grad)
            return


def _require_input_grad(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x_TD = args[0]
    if x_TD.requires_grad or not torch.is_grad_enabled():
        return None
    return (x_TD.detach().requires_grad_(), *args[1:])
