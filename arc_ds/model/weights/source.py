"""Read backbones from files. `open_backbone` detects the format of a path and checks it before loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.gguf_file import GgufStore, sizes_of_gguf
from arc_ds.model.weights.hf_config import RopeScalingChoice, Sizes, sizes_of_hugging_face
from arc_ds.model.weights.layouts import GGUF_LLAMA, HUGGING_FACE, NATIVE, OLMO_NATIVE, Layout
from arc_ds.model.weights.locate import Found, locate
from arc_ds.model.weights.names import Shape, backbone_shapes, permute_rotary, rotary_heads
from arc_ds.model.weights.native_config import is_olmo, shard_axis, sizes_of_native
from arc_ds.model.weights.stores import JoinedStore, PickleStore, SafetensorsStore, TensorStore, one_file_each

_MAX_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """A backbone in files. Only headers are read before `tensor` is called.

    config: sizes of the backbone.
    path: the folder or file.
    sliding_window: length of the longest sequence that it attends to fully; None for any length.
    layout: tensor names in the files.
    store: the files.
    """

    config: BackboneConfig
    path: Path
    sliding_window: int | None
    layout: Layout
    store: TensorStore

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every parameter by internal name."""
        return backbone_shapes(self.config)

    def names(self) -> tuple[str, ...]:
        """Internal names of all parameters, in forward order."""
        return tuple(self.shapes)

    def shape(self, name: str) -> Shape:
        """Shape of a parameter, without reading it."""
        return self.shapes[name]

    def tensor(self, name: str) -> Tensor:
        """Read one parameter by internal name, and no other.

        Returns a CPU tensor in the file's dtype (float32 if it was quantised), with rotary rows in half-split order.
        Raises KeyError for an unknown name.
        """
        rows, file_name = self._rows_in_file(name)
        weight = self.store.read(file_name, rows)
        heads = rotary_heads(name, self.config)
        if heads is not None and self.layout.interleaved:
            weight = permute_rotary(weight, heads, to="half")
        return weight

    def check(self) -> None:
        """Raise WeightsError with all tensors that are missing or whose shape contradicts the sizes."""
        present = self.store.names()
        faults = []
        for file_name, expected in self._file_shapes().items():
            if file_name not in present:
                faults.append(f"`{file_name}` is missing, expected {list(expected)}")
            elif self.store.shape(file_name) != expected:
                faults.append(f"`{file_name}` is {list(self.store.shape(file_name))}, expected {list(expected)}")
        if not faults:
            return
        listed = "; ".join(faults[:_MAX_LISTED])
        more = f"; and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
        raise WeightsError(
            f"{self.path} does not hold the tensors that its sizes require ({self.layout.name} names): {listed}{more}. "
            "Copy the weights and their config or params file again from one source."
        )

    def _rows_in_file(self, name: str) -> tuple[slice, str]:
        if name not in self.shapes:
            raise KeyError(name)
        rule = self.layout.rule(name)
        if not rule.stacked:
            return slice(None), rule.file_name
        before = rule.stacked[: rule.stacked.index(name)]
        start = sum(self.shapes[other][0] for other in before)
        return slice(start, start + self.shapes[name][0]), rule.file_name

    def _file_shapes(self) -> dict[str, Shape]:
        """Shape of every tensor that the files must contain, by its name in the files."""
        expected: dict[str, Shape] = {}
        for name, shape in self.shapes.items():
            rule = self.layout.rule(name)
            rows = sum(self.shapes[other][0] for other in rule.stacked) if rule.stacked else shape[0]
            expected[rule.file_name] = (rows, *shape[1:])
        return expected


def open_backbone(
    path: str | Path, rope_scaling: RopeScalingChoice = "checkpoint", *, max_positions: int | None = None
) -> BackboneSource:
    """Open a backbone's weights and detect their format.

    path: a Hugging Face folder, a Meta or Mistral folder, OLMo-1 in either of its layouts, or a GGUF file.
    rope_scaling: "checkpoint" applies the rotary scaling of the files, "none" ignores it.
    max_positions: length in tokens of the longest sequence that will be run, if known.

    Raises WeightsError if the path cannot be read, a tensor is missing or has the wrong shape, the family is unknown,
    or the model's attention window is shorter than `max_positions`. ARC-DS always attends to whole sequences.
    """
    found = locate(Path(path))
    if not found.files:
        raise WeightsError(
            f"{found.path} holds sizes but no weights that ARC-DS can read; expected .safetensors files, Meta's "
            "consolidated.00.pth, or a .gguf file. Copy the weights there; convert .bin files to safetensors first."
        )
    store = _open_store(found)
    sizes = _sizes(found, store, rope_scaling)
    source = BackboneSource(
        config=sizes.config,
        path=found.path,
        sliding_window=sizes.sliding_window,
        layout=_layout(found, store),
        store=store,
    )
    source.check()
    _check_window(source, max_positions)
    return source


def read_backbone_config(path: str | Path, rope_scaling: RopeScalingChoice = "checkpoint") -> BackboneConfig:
    """Read only the sizes of a backbone. The folder need not contain weights, except for OLMo-1 with `params.json`.

    Raises WeightsError like `open_backbone`, but does not check tensors.
    """
    found = locate(Path(path))
    store = _open_store(found) if found.files and found.kind != "hugging_face" else None
    return _sizes(found, store, rope_scaling).config


def _open_store(found: Found) -> TensorStore:
    if found.kind == "gguf":
        return GgufStore(found.path)
    parts = [PickleStore(file) if file.suffix == ".pth" else SafetensorsStore(file) for file in found.files]
    if len(parts) == 1:
        return parts[0]
    if found.kind == "native":
        return JoinedStore(parts, shard_axis(Fields.read(found.path / "params.json").integer("dim")))
    return JoinedStore(parts, one_file_each)


def _sizes(found: Found, store: TensorStore | None, rope_scaling: RopeScalingChoice) -> Sizes:
    if isinstance(store, GgufStore):
        return sizes_of_gguf(store, rope_scaling)
    if found.kind == "native":
        return sizes_of_native(Fields.read(found.path / "params.json"), store, rope_scaling)
    return sizes_of_hugging_face(Fields.read(found.path / "config.json"), rope_scaling)


def _layout(found: Found, store: TensorStore) -> Layout:
    if found.kind == "gguf":
        return GGUF_LLAMA
    if is_olmo(store):
        return OLMO_NATIVE
    return NATIVE if found.kind == "native" else HUGGING_FACE


def _check_window(source: BackboneSource, max_positions: int | None) -> None:
    window = source.sliding_window
    if window is None or max_positions is None or max_positions <= window:
        return
    raise WeightsError(
        f"{source.path}: its attention looks back {window} tokens, but the run has sequences of {max_positions}. "
        f"ARC-DS attends to whole sequences. Limit sequences to {window} tokens, or use a model without a window."
    )
