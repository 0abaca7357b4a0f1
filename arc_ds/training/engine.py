"""The ZeRO-3 engine of the trained modules, and the placement of frozen decoders.

DeepSpeed is imported inside the functions that use it because inference and export do not need it.
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
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.lora import is_adapter
from arc_ds.model.transformers_decoder import TransformersDecoder
from arc_ds.system import dist
from arc_ds.training.optim import PortAdamW

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Placement = Literal["replicated", "zero3", "zero3+hpz"]

# Share of a device's free memory that a whole decoder may use. Encoder shards, optimizer and activations need the rest.
REPLICATED_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class PlacedDecoder:
    """A frozen decoder on its devices. Call it like the decoder itself.

    module: the decoder.
    engine: the ZeRO-3 engine that holds the decoder's shards; None if every rank has the whole decoder. It must live
        as long as the module because DeepSpeed removes its hooks when the engine is garbage-collected.
    """

    module: FrozenDecoder
    engine: DeepSpeedEngine | None = None

    @property
    def placement(self) -> Placement:
        """Where its weights are."""
        if self.engine is None:
            return "replicated"
        return "zero3+hpz" if self.engine.zero_hpz_partition_size() > 1 else "zero3"

    def __call__(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        if z_ZD is None and isinstance(self.module, Decoder):
            self.module.use_no_adapters()  # text alone (validation's bounds); the next vectors bring the adapters
        # Bypass the engine: without an optimizer its forward hooks raise an error in backward.
        return self.module(batch, z_ZD)


def set_trained(
    encoder: Encoder,
    *,
    trained_layers: int | None,
    train_embeddings: bool,
    train_memory: bool = True,
    lora_rank: int = 0,
) -> None:
    """Set which parts of the encoder are trained. Call it before `make_param_groups`.

    trained_layers: number of last layers to train; None for all.
    train_embeddings: whether to train the token embeddings.
    train_memory: whether to train the memory tokens, if there are any.
    lora_rank: rank of the encoder's adapters, which are always trained; 0 if it has none.
    """
    if encoder.memory is not None:
        encoder.memory.requires_grad_(train_memory)
    encoder.tok_embeddings.requires_grad_(train_embeddings)
    num_frozen = 0 if trained_layers is None else max(len(encoder.layers) - trained_layers, 0)
    for layer_idx, layer in enumerate(encoder.layers):
        layer.requires_grad_(layer_idx >= num_frozen)
    for name, param in encoder.named_parameters():
        if is_adapter(name):
            param.requires_grad_(lora_rank > 0)


def build_engine(compressor: Compressor, optimizer: PortAdamW, ds_config: Mapping[str, Any]) -> DeepSpeedEngine:
    """Build the ZeRO-3 engine of the compressor. Collective.

    optimizer: its groups come from `make_param_groups` of this compressor.
    ds_config: resolved, without "auto" values and with `zero_allow_untested_optimizer`.
    """
    _open_first_trained_layer(compressor.encoder)
    return _initialize(compressor, ds_config, (Block,), optimizer)


def choose_placement(
    choice: str, *, decoder_bytes: int, free_bytes: int | None, world_size: int, local_world_size: int
) -> Placement:
    """Resolve the placement "auto"; any other choice is returned unchanged.

    "replicated": if a copy of the decoder takes at most 0.4 of the device's free memory.
    "zero3+hpz": on several hosts, if each rank's shard of one copy per host takes at most that share. Gathers between
        hosts are about ten times slower than gathers within a host.
    "zero3": otherwise; sharded over all ranks.

    free_bytes: free memory of the device; None for devices such as the CPU that do not report it.
    local_world_size: number of ranks on this host.
    """
    if choice != "auto":
        return choice  # type: ignore[return-value]
    if world_size == 1 or free_bytes is None or decoder_bytes <= REPLICATED_SHARE * free_bytes:
        return "replicated"
    # hpZ needs groups of equal size with more than one rank, and more than one group.
    can_be_hpz = 1 < local_world_size < world_size and world_size % local_world_size == 0
    fits_on_host = decoder_bytes <= REPLICATED_SHARE * free_bytes * local_world_size
    return "zero3+hpz" if can_be_hpz and fits_on_host else "zero3"


@contextmanager
def partitioned(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Context in which new modules are built partitioned: each rank creates and keeps only its shards. Collective.

    Fill all parameters with `weights.load_backbone` and `weights.set_parameter`. Their initial values differ between
    ranks: DeepSpeed would send every parameter from rank 0 to the others, only for the files to replace it.

    ds_config: config of the engine that will hold the modules.
    """
    import deepspeed
    from deepspeed.utils import groups

    class Init(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    with _hpz_groups(ds_config):
        # Pass the config instead of `dtype`: with `dtype`, DeepSpeed 0.19.8 always builds bfloat16 on the CPU.
        group = groups._get_zero_param_intra_parallel_group()
        with Init(config_dict_or_path=dict(ds_config), zero_param_parallel_group=group):
            yield


def place_decoder(decoder: FrozenDecoder, ds_config: Mapping[str, Any] | None = None) -> PlacedDecoder:
    """Place a frozen decoder for use in steps. Collective.

    decoder: whole on its device, or built under `partitioned`.
    ds_config: of a sharded decoder's engine, from `config.deepspeed.resolve_decoder_deepspeed`; it contains the size of
        hpZ groups. None: every rank has the whole decoder.
    """
    decoder.requires_grad_(False)
    if isinstance(decoder, TransformersDecoder):
        decoder.reading = dist.broadcast_object(decoder.reading)
    if ds_config is None:
        return PlacedDecoder(module=decoder)
    engine = _initialize(decoder, ds_config, decoder.layer_types)
    return PlacedDecoder(module=engine.module, engine=engine)


def _initialize(
    module: nn.Module,
    ds_config: Mapping[str, Any],
    layer_types: tuple[type[nn.Module], ...],
    optimizer: PortAdamW | None = None,
) -> DeepSpeedEngine:
    import deepspeed

    # One gather per layer. Also, some methods use a norm's weight without triggering ZeRO-3's hooks.
    deepspeed.utils.set_z3_leaf_modules(module, list(layer_types))
    with _hpz_groups(ds_config):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
    return engine


@contextmanager
def _hpz_groups(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Give one engine the hpZ groups of its config, independent of engines built before.

    DeepSpeed 0.19 keeps these groups in a global variable. It shards every engine by that variable regardless of the
    engine's config, and it cannot create the groups for an engine without an optimizer (AttributeError).
    """
    from deepspeed.utils import groups

    before = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    try:
        num_ranks = ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
        if num_ranks > 1:
            groups._create_zero_param_parallel_group(num_ranks)
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = before


def _open_first_trained_layer(encoder: Encoder) -> None:
    """Make the input of the first trained layer require a gradient, even if everything before it is frozen.

    ZeRO-3 reduces a leaf module's gradients and frees its weights once the gradient of its input is computed. Without
    an input gradient it does so before the weight gradients are computed, and backward fails. Call this before
    `deepspeed.initialize` because hooks run in registration order.
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
