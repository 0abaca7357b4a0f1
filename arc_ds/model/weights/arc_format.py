"""The ARC checkpoint format of the reference implementation: `params.json`, `embedder/` and `bridge_module/`.

The files use the reference's tensor names and pair rotary dimensions (2i, 2i + 1). This module converts both. Our
checkpoints also contain `encoder_backbone.json` with the sizes of the encoder's backbone, which the format omits.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.lazy_tensor import LazyTensor, as_lazy, write_safetensors
from arc_ds.model.weights.names import Shape, permute_rotary, rotary_heads, rows_of_heads
from arc_ds.model.weights.source import read_backbone_config
from arc_ds.model.weights.stores import ALL_ROWS, SafetensorsStore, same_values

MULTI = "multi_module"  # the bridge_type of several decoders, each with a bridge of its own

PARAMS = "params.json"
SIZES = "encoder_backbone.json"
EMBEDDER = Path("embedder") / "consolidated.safetensors"
BRIDGE = Path("bridge_module") / "consolidated.safetensors"

_MARKER_IN_FILE = re.compile(r"^(rec|cont)_tok(?:\.(\d+))?\.weight$")
_MARKER = re.compile(r"^ports\.(\d+)\.(rec|cont)$")
_BRIDGE_IN_FILE = re.compile(r"^(?:(\d+)\.)?((?:layer1|layer2|norm)\.weight)$")
_BRIDGE = re.compile(r"^(?:ports\.(\d+)\.)?bridge\.((?:layer1|layer2|norm)\.weight)$")
_MEMORY_IN_FILE = ("mem_embeddings.0.weight", "mem_embeddings.weight")
_BACKBONE_IN_FILE = re.compile(r"^(tok_embeddings\.weight|layers\.\d+\..+)$")
_PORT = re.compile(r"^ports\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class ArcCheckpoint:
    """An opened ARC checkpoint: its tensors by internal name, with rotary rows in half-split order.

    Only headers have been read. The internal names are those of a `Compressor`: `encoder.*`, `ports.{n}.rec`,
    `ports.{n}.cont`, `ports.{n}.bridge.*`, and `bridge.*` for one bridge of several decoders. The shapes are those of
    the file; `check_fit` compares them with a model.

    path: the checkpoint's folder.
    params: the settings in `params.json`.
    backbone: sizes of the encoder's whole backbone.
    file_names: for each internal tensor name, its file and its name there.
    num_decoders: see `read_arc_checkpoint`.
    """

    path: Path
    params: Fields
    backbone: BackboneConfig
    file_names: Mapping[str, tuple[SafetensorsStore, str]]
    num_decoders: int = 0

    @property
    def num_ports(self) -> int:
        """Number of decoders for which it has a bridge or markers."""
        return max(num_ports(self.file_names), self.num_decoders)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, without reading it."""
        return {name: store.shapes[file_name] for name, (store, file_name) in self.file_names.items()}

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a tensor, or a slice of its rows, to the CPU in the file's dtype."""
        store, file_name = self.file_names[name]
        heads = rotary_heads(name, self.backbone)
        if heads is None:
            return store.tensor(file_name, rows)
        read, reorder = partial(store.tensor, file_name), partial(permute_rotary, to="half")
        return rows_of_heads(read, rows, self.shapes[name][0], heads, reorder)


def read_arc_checkpoint(
    path: str | Path, encoder_backbone: str | Path | None = None, *, num_decoders: int = 0
) -> ArcCheckpoint:
    """Open an ARC checkpoint of the reference or of ARC-DS. Old markers without a decoder number belong to decoder 0.

    encoder_backbone: folder with the sizes of the encoder's backbone. Checkpoints of the reference do not contain them.
        Sizes in the checkpoint take precedence, because they describe the training.
    num_decoders: number of decoders, if it is known from elsewhere. Without markers, the tensors of a bridge that
        several decoders share do not tell it.

    Raises WeightsError if a file is missing, damaged or contains a tensor that is not part of the format, or if sizes
    are missing.
    """
    folder = Path(path)
    if not (folder / PARAMS).is_file() or not (folder / EMBEDDER).is_file():
        raise WeightsError(
            f"{folder} is not an ARC checkpoint; expected {PARAMS} and {EMBEDDER} in it. Pass the folder of one "
            "checkpoint, such as checkpoints/checkpoint_080000."
        )
    params = Fields.read(folder / PARAMS)
    names = _internal_names(folder / EMBEDDER, embedder_name)
    if params.object("bridge_module", {}).get("bridge_type") is not None:
        if not (folder / BRIDGE).is_file():
            raise WeightsError(f"{folder} has no {BRIDGE}, but {PARAMS} names a bridge. Copy the whole checkpoint.")
        several = max(num_ports(names), num_decoders) > 1
        is_shared = several and params.object("bridge_module").get("bridge_type") != MULTI
        names.update(_internal_names(folder / BRIDGE, partial(bridge_name, shared=is_shared)))
    if (folder / SIZES).is_file():
        backbone = _read_sizes(folder / SIZES)
    elif encoder_backbone is not None:
        backbone = read_backbone_config(encoder_backbone, "none")
    else:
        raise WeightsError(
            f"{folder} does not contain the sizes of its encoder's backbone; pass the backbone's folder as "
            "encoder_backbone (its config.json or params.json is enough)."
        )
    return ArcCheckpoint(path=folder, params=params, backbone=backbone, file_names=names, num_decoders=num_decoders)


def write_arc_checkpoint(
    folder: Path, params: Mapping[str, Any], tensors: Mapping[str, Tensor | LazyTensor], backbone: BackboneConfig
) -> dict[str, str]:
    """Write the files of an ARC checkpoint, which the reference can read, to an existing folder.

    params: the content of `params.json`. Its param_dtype should name the dtype of the tensors.
    tensors: tensors by internal name (`Compressor.named_parameters()`), written in their own dtype and in blocks.
    backbone: sizes of the encoder's whole backbone.

    Returns xxh128 of each tensor file by its path in the folder. Raises WeightsError if a tensor has no place in the
    format.
    """
    embedder, bridge = _reference_tensors(params, tensors, backbone)
    digests = {}
    for target, content in ((EMBEDDER, embedder), (BRIDGE, bridge)):
        if content:
            (folder / target).parent.mkdir(parents=True)
            digests[target.as_posix()] = write_safetensors(folder / target, content)
    write_settings(folder, params, backbone)
    return digests


def write_settings(folder: Path, params: Mapping[str, Any], backbone: BackboneConfig) -> None:
    """Write the two JSON files of an ARC checkpoint."""
    (folder / PARAMS).write_text(json.dumps(params, indent=4), encoding="utf-8")
    sizes = json.dumps(dataclasses.asdict(backbone), indent=4)
    (folder / SIZES).write_text(sizes + "\n", encoding="utf-8")


def _reference_tensors(
    params: Mapping[str, Any], tensors: Mapping[str, Tensor | LazyTensor], backbone: BackboneConfig
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The tensors of embedder and bridge, by the reference's names."""
    multi = (params["bridge_module"] or {}).get("bridge_type") == MULTI
    embedder: dict[str, LazyTensor] = {}
    bridge: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        stored = _interleaved(name, as_lazy(tensor), backbone)
        if match := _BRIDGE.match(name):
            if not multi and int(match.group(1) or 0) > 0:
                raise WeightsError(f"`{name}` belongs to a second decoder; bridge_type must be {MULTI} to hold it.")
            bridge[f"{match.group(1)}.{match.group(2)}" if multi else match.group(2)] = stored
        elif match := _MARKER.match(name):
            embedder[f"{match.group(2)}_tok.{match.group(1)}.weight"] = stored
        elif name == "encoder.memory":
            embedder[_MEMORY_IN_FILE[0]] = stored
        elif name.startswith("encoder.") and _BACKBONE_IN_FILE.match(name.removeprefix("encoder.")):
            embedder[name.removeprefix("encoder.")] = stored
        else:
            raise WeightsError(f"tensor `{name}` has no place in an ARC checkpoint; pass a compressor's parameters.")
    return embedder, bridge


def _interleaved(name: str, tensor: LazyTensor, backbone: BackboneConfig) -> LazyTensor:
    """The tensor with the reference's order of rotary rows. Rows move only within their head."""
    heads = rotary_heads(name, backbone) if name.startswith("encoder.") else None
    if heads is None:
        return tensor
    values_per_head = tensor.numel() // heads
    rows_per_head = tensor.shape[0] // heads

    def permute(values: Tensor) -> Tensor:
        num_heads = values.numel() // values_per_head
        rows = values.reshape(num_heads * rows_per_head, -1)
        return permute_rotary(rows, num_heads, to="interleaved").reshape(-1)

    return tensor.map(permute, unit=values_per_head)


def _internal_names(file: Path, rename: Callable[[str], str | None]) -> dict[str, tuple[SafetensorsStore, str]]:
    """The tensors of a file by internal name. `rename` returns None for a name that is not part of the format."""
    store = SafetensorsStore(file)
    names: dict[str, tuple[SafetensorsStore, str]] = {}
    for file_name in sorted(store.shapes):
        internal = rename(file_name)
        if internal is None:
            raise WeightsError(f"{file}: tensor `{file_name}` is not part of the ARC format. Check the file.")
        if internal in names and not same_values(store.tensor(names[internal][1]), store.tensor(file_name)):
            raise WeightsError(
                f"{file}: `{names[internal][1]}` and `{file_name}` are names of one tensor, but hold other values. "
                "Save the file with one of them."
            )
        names[internal] = store, file_name
    return names


def embedder_name(file_name: str) -> str | None:
    """The internal name of a tensor in `embedder/`; None if the format has no such tensor."""
    if match := _MARKER_IN_FILE.match(file_name):
        return f"ports.{match.group(2) or 0}.{match.group(1)}"
    if file_name in _MEMORY_IN_FILE:
        return "encoder.memory"
    return f"encoder.{file_name}" if _BACKBONE_IN_FILE.match(file_name) else None


def bridge_name(file_name: str, *, shared: bool) -> str | None:
    """The internal name of a tensor in `bridge_module/`; None if the format has no such tensor.

    shared: whether several decoders share a bridge without a number.
    """
    match = _BRIDGE_IN_FILE.match(file_name)
    if match is None:
        return None
    if shared and match.group(1) is None:
        return f"bridge.{match.group(2)}"
    return f"ports.{match.group(1) or 0}.bridge.{match.group(2)}"


def num_ports(names: Iterable[str]) -> int:
    """Number of decoders that internal names of tensors mention."""
    ports = [int(match.group(1)) for name in names if (match := _PORT.match(name))]
    return max(ports, default=-1) + 1


def _read_sizes(file: Path) -> BackboneConfig:
    fields = Fields.read(file)
    try:
        return BackboneConfig.from_json(fields.values)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{file} does not contain a backbone's sizes: {error}. Export again.") from error
