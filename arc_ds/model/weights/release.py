"""Released encoders as downloaded: one `model.safetensors` with the tensors of an ARC checkpoint.

The names are those of the ARC format with the prefix `embedder.` or `bridge_module.`. The file has no sizes and no
settings, so both come from its shapes, from the backbone, and from a `config.json` if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arc_ds.batch.segments import MARKERS
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import BridgeKind
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights.arc_format import BRIDGE, EMBEDDER, bridge_name, embedder_name, num_ports, write_settings
from arc_ds.model.weights.arc_spec import params_of_spec, spec_of_params
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.lazy_tensor import lazy_rows, write_safetensors
from arc_ds.model.weights.names import Shape, shape_faults
from arc_ds.model.weights.stores import SafetensorsStore

RELEASE_WEIGHTS = "model.safetensors"
_PREFIXES = {"embedder.": EMBEDDER, "bridge_module.": BRIDGE}

# The backbone of the public encoders. Sizes from Meta's `params.json`, without rotary scaling, as they were trained.
LLAMA_32_3B = BackboneConfig(
    family="llama",
    hidden_size=3072,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=8192,
    vocab_size=128256,
    rope_theta=500000.0,
    norm_eps=1e-5,
)


@dataclass(frozen=True, kw_only=True)
class Release:
    """An opened and checked release.

    store: its tensor file.
    spec: the compressor that the tensors make.
    """

    store: SafetensorsStore
    spec: CompressorSpec


def release_file(path: Path) -> Path:
    """The tensor file of a release. `path` is its folder, or the file itself."""
    return path / RELEASE_WEIGHTS if path.is_dir() else path


def is_release(path: Path) -> bool:
    """Whether a folder or file is a release as downloaded. Raises WeightsError if its tensor file is damaged."""
    file = release_file(path)
    return (
        file.suffix == ".safetensors"
        and file.is_file()
        and any(name.startswith("embedder.") for name in SafetensorsStore(file).shapes)
    )


def open_release(path: Path, backbone: BackboneConfig = LLAMA_32_3B, *, pooling_factor: int = 8) -> Release:
    """Open a release and check every name and shape. Reads headers only.

    path: the downloaded folder, or the tensor file in it.
    backbone: sizes of the encoder's backbone, with all its layers.
    pooling_factor: factor of the last layer, if no config.json has the pooling.

    Raises WeightsError that lists all faults: names that are missing or unknown, and other shapes than the backbone's.
    """
    file = release_file(path)
    if not is_release(path):
        raise WeightsError(
            f"{path} is not a released encoder: expected {RELEASE_WEIGHTS} with tensors embedder.* and "
            "bridge_module.* in it. Give the folder that was downloaded."
        )
    store = SafetensorsStore(file)
    shapes, unknown = _internal_shapes(store.shapes)
    spec = _with_settings(_spec_of_shapes(shapes, backbone, pooling_factor), file.parent)
    faults = [f"`{name}` is not a name of the ARC format" for name in unknown]
    if spec.num_layers > backbone.num_layers:
        faults.append(f"it has {spec.num_layers} layers, but the backbone has {backbone.num_layers}")
        spec = replace(spec, num_layers=backbone.num_layers)
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in build_compressor(spec).named_parameters()}
    faults += shape_faults(expected, shapes)
    faults += [f"`{name}` has no place in the model" for name in sorted(shapes.keys() - expected.keys())]
    if faults:
        lines = "\n  ".join(faults)
        raise WeightsError(
            f"{file} does not fit a backbone of width {backbone.hidden_size} with {backbone.num_layers} layers "
            f"(`encoder.` and `ports.` are our names for its tensors):\n  {lines}\nDownload the file again. If the "
            "encoder has another backbone than Llama 3.2 3B, give its folder: --encoder-backbone FOLDER."
        )
    return Release(store=store, spec=spec)


def write_release(release: Release, folder: Path) -> None:
    """Write a release to an existing folder as an ARC checkpoint: the same bytes of each tensor under the same names.

    Copies block by block, so memory does not grow with the tensors.
    """
    store = release.store
    dtype = "bfloat16" if set(store.formats.values()) == {"BF16"} else "float32"
    write_settings(folder, params_of_spec(release.spec, dtype), release.spec.backbone)
    with tqdm(total=store.path.stat().st_size, unit="B", unit_scale=True, desc="import", disable=None) as bar:

        def count(values: Tensor) -> Tensor:
            bar.update(values.nbytes)
            return values

        for prefix, target in _PREFIXES.items():
            names = [name for name in store.shapes if name.startswith(prefix)]
            if names:
                (folder / target).parent.mkdir()
                part = {
                    name.removeprefix(prefix): lazy_rows(store, name, store.tensor(name, slice(0, 0)).dtype).map(count)
                    for name in names
                }
                write_safetensors(folder / target, part, {"format": "pt"})


def _internal_shapes(tensors: Mapping[str, Shape]) -> tuple[dict[str, Shape], list[str]]:
    """Shapes by internal name, and the names that have none."""
    names: dict[str, str | None] = dict.fromkeys(tensors)
    embedder = [name for name in tensors if name.startswith("embedder.")]
    names |= {name: embedder_name(name.removeprefix("embedder.")) for name in embedder}
    several = num_ports(name for name in names.values() if name) > 1
    bridge = [name for name in tensors if name.startswith("bridge_module.")]
    names |= {name: bridge_name(name.removeprefix("bridge_module."), shared=several) for name in bridge}
    shapes = {internal: tensors[name] for name, internal in names.items() if internal is not None}
    return shapes, sorted(name for name, internal in names.items() if internal is None)


def _spec_of_shapes(shapes: Mapping[str, Shape], backbone: BackboneConfig, pooling_factor: int) -> CompressorSpec:
    """The spec that the names and shapes suggest. The caller compares them with it."""
    layers = [int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")]
    is_shared = any(name.startswith("bridge.") for name in shapes)
    first = "bridge." if is_shared else "ports.0.bridge."
    kind: BridgeKind = "none"
    hidden, out_size = None, backbone.hidden_size
    if f"{first}layer1.weight" in shapes:
        kind, out_size = "linear", shapes[f"{first}layer1.weight"][0]
    if f"{first}layer2.weight" in shapes:
        kind = "rms" if f"{first}norm.weight" in shapes else "mlp"
        hidden, out_size = out_size, shapes[f"{first}layer2.weight"][0]
    memory_tokens = shapes.get("encoder.memory", (0,))[0]
    return CompressorSpec(
        backbone=backbone,
        num_layers=max(layers, default=backbone.num_layers - 1) + 1,
        rules=() if memory_tokens else group_rules("mean", (pooling_factor,)),
        memory_tokens=memory_tokens,
        markers=tuple(m for m in MARKERS if any(name.endswith(f".{m}") for name in shapes)),
        bridge=kind,
        bridge_hidden_size=hidden,
        bridge_shared=is_shared,
        decoder_sizes=(out_size,) * max(num_ports(shapes), 1),
    )


def _with_settings(spec: CompressorSpec, folder: Path) -> CompressorSpec:
    """The spec with the pooling and attention of the release's config.json, if it has them."""
    file = folder / "config.json"
    found = _find(Fields.read(file).values, "embedder_params") if file.is_file() else None
    if found is None:
        return spec
    params = params_of_spec(spec, "float32")
    keys = ("pooling_module", "compress_rates", "causal_embedder")
    params["embedder_params"] |= {key: found[key] for key in keys if found.get(key) is not None}
    read = spec_of_params(Fields(params, str(file)), spec.backbone, len(spec.decoder_sizes))
    return replace(
        spec, strategy=read.strategy, pooled_queries=read.pooled_queries, where=read.where, rules=read.rules,
        causal=read.causal,
    )  # fmt: skip


def _find(value: Any, key: str) -> Mapping[str, Any] | None:
    """The first object under a key, at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get(key), Mapping):
            return value[key]
        return next((found for child in value.values() if (found := _find(child, key)) is not None), None)
    return None
