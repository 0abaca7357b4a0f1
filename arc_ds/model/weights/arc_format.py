"""The ARC checkpoint format of the reference implementation: `params.json`, `embedder/` and `bridge_module/`.

The files use the reference's tensor names and pair rotary dimensions (2i, 2i + 1). This module converts both. Our
checkpoints also contain `encoder_backbone.json` with the sizes of the encoder's backbone, which the format omits.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.weights.arc_params import MULTI, ArcParams
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.names import Shape, layer_shapes, permute_rotary, rotary_heads
from arc_ds.model.weights.stores import SafetensorsStore
from arc_ds.system.files import whole_folder

PARAMS = "params.json"
SIZES = "encoder_backbone.json"
EMBEDDER = Path("embedder") / "consolidated.safetensors"
BRIDGE = Path("bridge_module") / "consolidated.safetensors"

_MARKER_IN_FILE = re.compile(r"^(rec|cont)_tok(?:\.(\d+))?\.weight$")
_MARKER = re.compile(r"^ports\.(\d+)\.(rec|cont)$")
_BRIDGE_IN_FILE = re.compile(r"^(?:(\d+)\.)?((?:layer1|layer2|norm)\.weight)$")
_BRIDGE = re.compile(r"^ports\.(\d+)\.bridge\.((?:layer1|layer2|norm)\.weight)$")
_MEMORY_IN_FILE = ("mem_embeddings.0.weight", "mem_embeddings.weight")
_BACKBONE_IN_FILE = re.compile(r"^(tok_embeddings\.weight|layers\.\d+\..+)$")
_PORT = re.compile(r"^ports\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class ArcCheckpoint:
    """An opened ARC checkpoint. Only headers have been read.

    path: the checkpoint's folder.
    params: the settings in `params.json`.
    backbone: sizes of the encoder's backbone; None if the checkpoint does not contain them.
    file_names: for each internal tensor name, its file and its name there.
    """

    path: Path
    params: ArcParams
    backbone: BackboneConfig | None
    file_names: Mapping[str, tuple[SafetensorsStore, str]]

    @property
    def num_ports(self) -> int:
        """Number of decoders for which it has a bridge or markers."""
        ports = [int(match.group(1)) for name in self.file_names if (match := _PORT.match(name))]
        return max(ports, default=-1) + 1

    def source(self, backbone: BackboneConfig | None = None) -> ArcSource:
        """Its tensors by internal name, for `load_backbone(compressor, ...)`.

        backbone: sizes of the encoder's whole backbone; None to use the sizes in the checkpoint.

        Raises WeightsError if sizes are missing or a tensor does not fit them.
        """
        sizes = backbone or self.backbone
        if sizes is None:
            raise WeightsError(
                f"{self.path} does not contain the sizes of its encoder's backbone; pass the backbone's folder as "
                "encoder_backbone (its config.json or params.json is enough)."
            )
        source = ArcSource(checkpoint=self, backbone=sizes)
        source.check()
        return source


@dataclass(frozen=True, kw_only=True)
class ArcSource:
    """The tensors of an ARC checkpoint by internal name, with rotary rows in half-split order."""

    checkpoint: ArcCheckpoint
    backbone: BackboneConfig

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.path

    def names(self) -> tuple[str, ...]:
        """Internal names: `encoder.*`, `ports.{n}.rec`, `ports.{n}.cont`, `ports.{n}.bridge.*`."""
        return tuple(self.checkpoint.file_names)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        store, file_name = self.checkpoint.file_names[name]
        return store.shape(file_name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor to the CPU in the file's dtype."""
        store, file_name = self.checkpoint.file_names[name]
        return _turned(name, store.read(file_name), self.backbone, to_file=False)

    def check(self) -> None:
        """Raise WeightsError if a tensor's shape differs from the one that backbone and params imply."""
        expected = self._expected
        faults = [
            f"`{self.checkpoint.file_names[name][1]}` is {list(self.shape(name))}, expected "
            f"{list(expected[name]) if name in expected else 'no such tensor'}"
            for name in self.names()
            if expected.get(name) != self.shape(name)
        ]
        if faults:
            raise WeightsError(
                f"{self.path} does not fit the given backbone: {'; '.join(faults[:8])}. "
                "Check that encoder_backbone is the backbone that it was trained from."
            )

    @cached_property
    def _expected(self) -> dict[str, Shape]:
        sizes, params = self.backbone, self.checkpoint.params
        width = sizes.hidden_size
        shapes: dict[str, Shape] = {
            "encoder.tok_embeddings.weight": (sizes.vocab_size, width),
            "encoder.memory": (params.embedder.memory_tokens, width),
        }
        for i in range(sizes.num_layers - params.embedder.n_truncated_layers):
            shapes.update({f"encoder.layers.{i}.{n}": shape for n, shape in layer_shapes(sizes).items()})
        for port in range(self.checkpoint.num_ports):
            shapes[f"ports.{port}.rec"] = shapes[f"ports.{port}.cont"] = (1, width)
            shapes.update({f"ports.{port}.bridge.{n}": shape for n, shape in _bridge_shapes(params).items()})
        return shapes


def read_arc_checkpoint(path: str | Path) -> ArcCheckpoint:
    """Open an ARC checkpoint of the reference or of ARC-DS. Old markers without a decoder number belong to decoder 0.

    Raises WeightsError if a file is missing, damaged or contains a tensor that is not part of the format.
    """
    folder = Path(path)
    if not (folder / PARAMS).is_file() or not (folder / EMBEDDER).is_file():
        raise WeightsError(
            f"{folder} is not an ARC checkpoint; expected {PARAMS} and {EMBEDDER} in it. Pass the folder of one "
            "checkpoint, such as checkpoints/checkpoint_080000."
        )
    params = ArcParams.of(Fields.read(folder / PARAMS))
    embedder = SafetensorsStore(folder / EMBEDDER)
    names = {_internal(name, _embedder_name, folder / EMBEDDER): (embedder, name) for name in sorted(embedder.names())}
    if params.bridge is not None and params.bridge.bridge_type is not None:
        if not (folder / BRIDGE).is_file():
            raise WeightsError(f"{folder} has no {BRIDGE}, but {PARAMS} names a bridge. Copy the whole checkpoint.")
        bridge = SafetensorsStore(folder / BRIDGE)
        names.update({_internal(n, _bridge_name, folder / BRIDGE): (bridge, n) for n in sorted(bridge.names())})
    sizes = folder / SIZES
    return ArcCheckpoint(
        path=folder,
        params=params,
        backbone=_backbone_of(Fields.read(sizes)) if sizes.is_file() else None,
        file_names=names,
    )


def write_arc_checkpoint(
    path: str | Path,
    params: ArcParams,
    tensors: Mapping[str, Tensor],
    backbone: BackboneConfig,
    *,
    overwrite: bool = False,
) -> None:
    """Write an ARC checkpoint that the reference can read. The folder `path` appears atomically.

    params: the content of `params.json`. Its param_dtype should name the dtype of the tensors.
    tensors: tensors by internal name (`Compressor.named_parameters()`), written in their own dtype.
    backbone: sizes of the encoder's whole backbone.
    overwrite: replace an earlier ARC checkpoint.

    Raises WeightsError if `path` is not an empty folder and `overwrite` is False, if `path` is not an ARC checkpoint,
    or if a tensor has no place in the format.
    """
    folder = Path(path)
    is_taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if is_taken and not overwrite:
        raise WeightsError(f"{folder} exists already. Choose another folder, or pass overwrite=True.")
    if is_taken and not (folder / PARAMS).is_file():
        raise WeightsError(f"{folder} is not an ARC checkpoint, so it is not overwritten. Choose another folder.")
    embedder, bridge = _reference_tensors(params, tensors, backbone)
    with whole_folder(folder) as new:
        for target, content in ((EMBEDDER, embedder), (BRIDGE, bridge)):
            if content:
                (new / target).parent.mkdir(parents=True)
                save_file(content, new / target)
        (new / PARAMS).write_text(params.to_json(), encoding="utf-8")
        sizes = json.dumps(dataclasses.asdict(backbone), indent=4)
        (new / SIZES).write_text(sizes + "\n", encoding="utf-8")


def _reference_tensors(
    params: ArcParams, tensors: Mapping[str, Tensor], backbone: BackboneConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of embedder and bridge, by the reference's names."""
    multi = params.bridge is not None and params.bridge.bridge_type == MULTI
    embedder: dict[str, Tensor] = {}
    bridge: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored = _turned(name, tensor.detach().cpu(), backbone, to_file=True).contiguous()
        if match := _BRIDGE.match(name):
            if not multi and int(match.group(1)) > 0:
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


def _turned(name: str, tensor: Tensor, backbone: BackboneConfig, *, to_file: bool) -> Tensor:
    heads = rotary_heads(name, backbone) if name.startswith("encoder.") else None
    if heads is None:
        return tensor
    return permute_rotary(tensor, heads, to="interleaved" if to_file else "half")


def _internal(file_name: str, rename: Callable[[str], str | None], file: Path) -> str:
    internal = rename(file_name)
    if internal is None:
        raise WeightsError(f"{file}: tensor `{file_name}` is not part of the ARC format. Check the file.")
    return internal


def _embedder_name(file_name: str) -> str | None:
    if match := _MARKER_IN_FILE.match(file_name):
        return f"ports.{match.group(2) or 0}.{match.group(1)}"
    if file_name in _MEMORY_IN_FILE:
        return "encoder.memory"
    return f"encoder.{file_name}" if _BACKBONE_IN_FILE.match(file_name) else None


def _bridge_name(file_name: str) -> str | None:
    match = _BRIDGE_IN_FILE.match(file_name)
    return f"ports.{match.group(1) or 0}.bridge.{match.group(2)}" if match else None


def _bridge_shapes(params: ArcParams) -> dict[str, Shape]:
    bridge = params.bridge
    if bridge is None or bridge.bridge_type is None:
        return {}
    if bridge.bridge_type == "linear":
        return {"layer1.weight": (bridge.out_dim, bridge.in_dim)}
    hidden = bridge.hidden_dim or bridge.out_dim
    shapes: dict[str, Shape] = {
        "layer1.weight": (hidden, bridge.in_dim),
        "layer2.weight": (bridge.out_dim, hidden),
    }
    return {**shapes, "norm.weight": (bridge.in_dim,)} if bridge.bridge_type == "rms" else shapes


def _backbone_of(fields: Fields) -> BackboneConfig:
    try:
        values = dict(fields.values)
        scaling = values.pop("rope_scaling", None)
        return BackboneConfig(**values, rope_scaling=None if scaling is None else RopeScaling(**scaling))
    except TypeError as error:
        raise WeightsError(f"{fields.where} does not contain a backbone's sizes: {error}. Export again.") from error
