"""Ports of a run: the ones that it trains, and the ones that it keeps unchanged from the weights it starts from.

The compressor of a run has the ports of its trained decoders only. A kept port costs no memory of a device, no step
uses it, and its decoder is not loaded. Checkpoints hold its tensors in a file of their own, in the dtype of the weights
it came from, so they stay equal to the bit in every precision and in exports of exports.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.schema import DecoderConfig, RunConfig
from arc_ds.errors import ConfigError
from arc_ds.inference.load import ArcFolder
from arc_ds.inference.weight_samples import difference_of_models
from arc_ds.model.spec import CompressorSpec, build_port
from arc_ds.model.weights import SelectedTensors, TensorSource, use_memory_tokens
from arc_ds.system import dist

logger = logging.getLogger(__name__)


class KeptPort(NamedTuple):
    """A port that a run keeps unchanged.

    place: its place in checkpoints and exports.
    source: its number in `encoder.init_from`.
    name: of its decoder.
    """

    place: int
    source: int
    name: str


@dataclass(frozen=True, kw_only=True)
class PortPlan:
    """Origin and place of each port.

    sources: for each trained decoder, the port of `encoder.init_from` that it continues; None for a fresh port.
    places: for each trained decoder, the place of its port in checkpoints and exports.
    kept: the kept ports.
    """

    sources: tuple[int | None, ...]
    places: tuple[int, ...]
    kept: tuple[KeptPort, ...] = ()

    @property
    def fresh(self) -> tuple[int, ...]:
        """Indices of the trained decoders whose ports start fresh."""
        return tuple(idx for idx, source in enumerate(self.sources) if source is None)


@dataclass(frozen=True, kw_only=True)
class PortRecord:
    """The record of a checkpoint about the decoder of a port.

    decoder: the decoder and its settings in training.
    ids_digest: of its tokenizer (`tokenizers.ids_digest`); None if unknown.
    weights: samples of its weights (`weight_samples.sample_weights`); None if unknown.
    """

    decoder: TrainedFor
    ids_digest: str | None
    weights: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class SavedPorts:
    """The ports of a run's checkpoints.

    spec: of a compressor with all of them.
    records: of all of them, in their order there.
    places: for each trained decoder, the place of its port.
    kept: tensors of the kept ports on rank 0, by their names in a compressor of `spec`.
    """

    spec: CompressorSpec
    records: tuple[PortRecord, ...]
    places: tuple[int, ...]
    kept: Mapping[str, Tensor]


def plan_ports(decoders: Sequence[DecoderConfig], names: Sequence[str | None], *, keep_unlisted: bool) -> PortPlan:
    """Match the decoders of a config with the ports of the weights that it starts from.

    A decoder belongs to the port of its name. Otherwise it belongs to the port at its own place in the list, except if
    that port is another decoder's, if `fresh_bridge` is set, or if the decoder is not trained and the port has a name.
    Ports keep their order; new ones follow.

    names: name of each port of the starting weights, if known. Empty if the run starts from a backbone.
    keep_unlisted: whether ports of no listed decoder are kept.

    Raises ConfigError if a decoder that is not trained has no port there.
    """
    owners: dict[int, int] = {}  # decoder of each port
    for idx, decoder in enumerate(decoders):
        if decoder.name in names:
            owners[names.index(decoder.name)] = idx
    named = set(owners.values())
    for idx, decoder in enumerate(decoders):
        is_free = idx < len(names) and idx not in owners and (decoder.train or names[idx] is None)
        if is_free and idx not in named and not decoder.fresh_bridge:
            owners[idx] = idx
    ports: list[tuple[int | None, int | None]] = [(port, owners.get(port)) for port in range(len(names))]
    ports = [(port, owner) for port, owner in ports if owner is not None or keep_unlisted]
    ports += [(None, idx) for idx in range(len(decoders)) if idx not in owners.values()]
    orphans = [decoder.name for idx, decoder in enumerate(decoders) if not decoder.train and idx not in owners.values()]
    if orphans:
        have = ", ".join(name or f"port {n}" for n, name in enumerate(names)) or "no ports"
        raise ConfigError(
            f"train is false for {', '.join(orphans)}, so encoder.init_from must have their bridges and markers; it "
            f"has {have}. Correct the names, or remove these decoders."
        )
    trained = [idx for idx, decoder in enumerate(decoders) if decoder.train]
    taken = {name for name in names if name} | {decoder.name for decoder in decoders}
    of_trained = {idx: (place, port) for place, (port, idx) in enumerate(ports) if idx in trained}
    return PortPlan(
        sources=tuple(None if decoders[idx].fresh_bridge else of_trained[idx][1] for idx in trained),
        places=tuple(of_trained[idx][0] for idx in trained),
        kept=tuple(
            KeptPort(place, port, (names[port] or _free_name(place, taken)) if idx is None else decoders[idx].name)
            for place, (port, idx) in enumerate(ports)
            if port is not None and idx not in trained
        ),
    )


def _free_name(place: int, taken: Collection[str]) -> str:
    """A name for the unnamed port at a place, other than the names of decoders."""
    name = f"decoder{place}"
    while name in taken:
        name += "_"
    return name


def tensors_of_run(folder: ArcFolder, spec: CompressorSpec, plan: PortPlan) -> TensorSource:
    """The starting weights of a run's compressor, by their names there. Fresh ports are absent.

    If the starting weights have a shared bridge, each port that continues one of theirs starts from a copy. If the run
    shares a bridge, it starts from the only bridge that its ports continue.
    """
    names = {name: name for name in folder.tensors.shapes if name.startswith("encoder.")}
    for idx, port in enumerate(plan.sources):
        if port is not None:
            names |= {f"ports.{idx}.{leaf}": _in_folder(leaf, port, folder.spec) for leaf in _leaves(spec, idx)}
    continued = [port for port in plan.sources if port is not None]
    if spec.bridge_shared and continued:
        bridge = (leaf for leaf in _leaves(replace(spec, bridge_shared=False), 0) if leaf.startswith("bridge."))
        names |= {leaf: _in_folder(leaf, continued[0], folder.spec) for leaf in bridge}
    found = {ours: theirs for ours, theirs in names.items() if theirs in folder.tensors.shapes}
    return use_memory_tokens(SelectedTensors(source=folder.tensors, names=found), spec.memory_tokens)


def saved_ports(
    trained: Sequence[PortRecord], spec: CompressorSpec, plan: PortPlan, folder: ArcFolder | None
) -> SavedPorts:
    """The ports of the run's checkpoints. Rank 0, which saves them, reads the tensors of kept ports.

    trained: records of the trained decoders.
    spec: of the run's compressor.
    folder: the weights that the run starts from, if they are not a backbone.
    """
    by_place = {
        place: (record, (size, spec.adapters_of(idx)))
        for idx, (place, record, size) in enumerate(zip(plan.places, trained, spec.decoder_sizes, strict=True))
    }
    kept: dict[str, Tensor] = {}
    for place, port, name in plan.kept:
        assert folder is not None, "only a folder of weights has ports to keep"
        theirs = folder.decoders[port]
        decoder = TrainedFor(
            name=name,
            rope_scaling=theirs.rope_scaling,
            implementation="native" if theirs.implementation == "auto" else theirs.implementation,
            bos=theirs.bos,
            chat_template=theirs.chat_template,
        )
        record = PortRecord(decoder=decoder, ids_digest=theirs.ids_digest, weights=theirs.weights)
        by_place[place] = record, (folder.spec.decoder_sizes[port], folder.spec.adapters_of(port))
        for leaf in _leaves(replace(folder.spec, bridge_shared=False), port) if dist.is_main() else ():
            kept[f"ports.{place}.{leaf}"] = folder.tensors.tensor(_in_folder(leaf, port, folder.spec))
    records, ports = zip(*(by_place[place] for place in sorted(by_place)), strict=True)
    return SavedPorts(spec=spec.with_ports(ports), records=records, places=plan.places, kept=kept)


def warn_of_ports(
    config: RunConfig,
    trained: Sequence[PortRecord],
    plan: PortPlan,
    folder: ArcFolder | None,
    *,
    trains_encoder: bool,
) -> None:
    """Warn of kept ports that may no longer fit a trained encoder, and of ports that get another decoder.

    trained: records of the trained decoders.
    folder: the weights that the run starts from, if they are not a backbone.
    """
    for idx, record, port in zip(config.trained_decoders, trained, plan.sources, strict=True):
        if folder is None or port is None:
            continue
        name, theirs = record.decoder.name, folder.decoders[port]
        remedy = f"If it is a new decoder, set decoders.{idx}.fresh_bridge=true."
        difference = difference_of_models(theirs.weights, record.weights) if theirs.weights and record.weights else None
        if difference is not None:
            logger.warning(
                "decoder %s continues the bridge and markers of %s, which were trained for another model: samples of "
                "its weights differ by %.1f%%. %s",
                *(name, theirs.name or f"port {port} of encoder.init_from", 100 * difference, remedy),
            )
        elif theirs.name not in (None, name):
            logger.warning(
                "decoder %s continues the bridge and markers of %s, which are at its place in encoder.init_from. %s",
                *(name, theirs.name, remedy),
            )
    if plan.kept and trains_encoder:
        logger.warning(
            "the run trains the encoder, but keeps the bridges and markers of %s unchanged: they may no longer fit it. "
            "To keep them usable, freeze the encoder (encoder.train=bridge), or "
            "train these decoders too. To leave them out, set encoder.keep_ports=false.",
            ", ".join(port.name for port in plan.kept),
        )


def _leaves(spec: CompressorSpec, port_idx: int) -> list[str]:
    """Names of the parameters of a port."""
    with torch.device("meta"):
        return [name for name, _ in build_port(spec, port_idx).named_parameters()]


def _in_folder(leaf: str, port: int, theirs: CompressorSpec) -> str:
    return leaf if theirs.bridge_shared and leaf.startswith("bridge.") else f"ports.{port}.{leaf}"
