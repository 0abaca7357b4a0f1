"""Read backbones from files. `open_backbone` detects the format of a path and checks it before loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights.families import NATIVE, OLMO_NATIVE, TensorNames
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.gguf_file import gguf_names, sizes_of_gguf
from arc_ds.model.weights.gguf_store import GgufStore
from arc_ds.model.weights.hf_config import RopeScalingChoice, names_of_hugging_face, sizes_of_hugging_face
from arc_ds.model.weights.leftovers import Backbone, leftover_faults
from arc_ds.model.weights.locate import WeightFiles, locate
from arc_ds.model.weights.names import (
    NamePredicate,
    Shape,
    backbone_shapes,
    join_faults,
    no_name,
    permute_rotary,
    rotary_heads,
    rows_of_heads,
    shape_faults,
    spread_rotary,
)
from arc_ds.model.weights.native_config import is_olmo, shard_axis, sizes_of_native
from arc_ds.model.weights.stores import (
    ALL_ROWS,
    JoinedStore,
    ModelParallelStore,
    PickleStore,
    SafetensorsStore,
    TensorStore,
)

_HEAD = "output.weight"
_BESIDE = ("*quant*config*.json", "adapter_config.json")  # settings that change the meaning of the weights


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """A backbone in files. Only headers are read before `tensor` is called.

    config: sizes of the backbone.
    path: the folder or file.
    tensor_names: tensor names in the files.
    store: the files.
    """

    config: BackboneConfig
    path: Path
    tensor_names: TensorNames
    store: TensorStore

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every parameter by internal name, in forward order."""
        return backbone_shapes(self.config)

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read one parameter, or a slice of its rows, by internal name, and no other.

        Returns a CPU tensor in the file's dtype (float32 if it was quantised), with rotary rows in half-split order.
        Raises KeyError for an unknown name.
        """
        num_rows = self.shapes[name][0]
        file_name, held = self.tensor_names.find(name)
        offset = sum(self.shapes[other][0] for other in held[: held.index(name)])

        def read(part: slice) -> Tensor:
            first, last, _ = part.indices(num_rows)
            is_whole = len(held) == 1 and (first, last) == (0, num_rows)
            return self.store.tensor(file_name, ALL_ROWS if is_whole else slice(offset + first, offset + last))

        heads = rotary_heads(name, self.config)
        is_reordered = self.tensor_names.interleaved or self.config.rotary_dim is not None
        if heads is None or not is_reordered:
            return read(rows)
        return rows_of_heads(read, rows, num_rows, heads, self._in_half_split_order)

    def _in_half_split_order(self, weight: Tensor, num_heads: int) -> Tensor:
        if self.tensor_names.interleaved:
            weight = permute_rotary(weight, num_heads, to="half")
        if self.config.rotary_dim is not None:
            weight = spread_rotary(weight, num_heads, self.config.rotary_dim)
        return weight

    def check(self, is_unused: NamePredicate) -> None:
        """Raise WeightsError with all tensors that are missing, contradict the sizes, or are no part of the model.

        is_unused: predicate on parameters whose tensors may be missing.
        """
        expected: dict[str, Shape] = {}
        known: set[str] = set()
        for name, shape in self.shapes.items():
            file_name, held = self.tensor_names.find(name)
            known.add(file_name)
            if not all(is_unused(other) for other in held):
                expected[file_name] = (sum(self.shapes[other][0] for other in held), *shape[1:])
        faults = shape_faults(expected, self.store.shapes)
        backbone = Backbone(self.config, self.tensor_names, self.store, has_head=not is_unused(_HEAD))
        leftovers = leftover_faults(backbone, known)
        head, _ = self.tensor_names.find(_HEAD)
        if len(faults) == 1 and not leftovers and head in expected and head not in self.store.shapes:
            raise WeightsError(
                f"{self.path}: {faults[0]}, and its config does not tie the head to the embedding. These are the "
                "weights of an encoder. A decoder needs a head: use the causal language model that they were made "
                "from. As encoder.backbone they need none."
            )
        empty = [name for name in expected if 0 in self.store.shapes.get(name, ())]
        if empty:
            raise WeightsError(
                f"{self.path}: `{empty[0]}` and {len(empty) - 1} others hold no values, because the model was saved "
                "while ZeRO-3 or FSDP had partitioned it. Save it whole: with DeepSpeed, run `python zero_to_fp32.py . "
                "OUT --safe_serialization` beside the checkpoints, or set stage3_gather_16bit_weights_on_model_save."
            )
        if faults or leftovers:
            clauses = [*leftovers, *([join_faults(faults)] if faults else [])]
            remedies = dict.fromkeys(leftovers.values()) or [
                "Copy the weights and their config or params file again from one source."
            ]
            raise WeightsError(
                f"{self.path} does not hold exactly the tensors that its sizes require ({self.tensor_names.name} "
                f"names): {'; '.join(clauses)}. {' '.join(remedies)}"
            )


def open_backbone(
    path: str | Path,
    rope_scaling: RopeScalingChoice = "checkpoint",
    *,
    is_unused: NamePredicate = no_name,
) -> BackboneSource:
    """Open a backbone's weights and detect their format.

    path: a Hugging Face folder of a family in `families.py`, a Meta or Mistral folder, OLMo-1 in either of its formats,
        or a GGUF file.
    rope_scaling: "checkpoint" applies the rotary scaling of the files, "none" ignores it.
    is_unused: predicate on internal names of parameters that will not be loaded, such as `names.beyond_layers(n)` for
        an encoder. Their tensors may be missing.

    Raises WeightsError if the path cannot be read, a tensor is missing or has the wrong shape, the files hold tensors
    that the model does not compute or settings that change the meaning of the weights, or the family is unknown.
    """
    found = _locate_plain(Path(path))
    if not found.files:
        raise WeightsError(
            f"{found.path} holds sizes but no weights that ARC-DS can read; expected .safetensors files, Meta's "
            "consolidated.00.pth, or a .gguf file. Copy the weights there; convert .bin files to safetensors first."
        )
    store = _open_store(found)
    names = _names(found, store)
    source = BackboneSource(
        config=_sizes(found, store, names, rope_scaling),
        path=found.path,
        tensor_names=names,
        store=store,
    )
    source.check(is_unused)
    return source


def read_backbone_config(path: str | Path, rope_scaling: RopeScalingChoice = "checkpoint") -> BackboneConfig:
    """Read only the sizes of a backbone. The folder need not contain weights, except for OLMo-1 with `params.json`.

    Raises WeightsError like `open_backbone`, but does not check tensors.
    """
    found = _locate_plain(Path(path))
    store = _open_store(found) if found.files and found.kind != "hugging_face" else None
    return _sizes(found, store, _names(found, store), rope_scaling)


def _open_store(found: WeightFiles) -> TensorStore:
    if found.kind == "gguf":
        return GgufStore(found.files)
    files = {file: PickleStore(file) if file.suffix == ".pth" else SafetensorsStore(file) for file in found.files}
    parts: list[TensorStore] = []
    for file_set in found.model_parallel:
        axis_of = shard_axis(Fields.read(found.config_file).integer("dim"))
        parts.append(ModelParallelStore([files.pop(file) for file in file_set], axis_of))
    parts += files.values()
    return parts[0] if len(parts) == 1 else JoinedStore(parts)


def _names(found: WeightFiles, store: TensorStore | None) -> TensorNames:
    if isinstance(store, GgufStore):
        return gguf_names(store)
    if is_olmo(store):
        names = OLMO_NATIVE
    else:
        names = names_of_hugging_face(Fields.read(found.config_file)) if found.kind == "hugging_face" else NATIVE
    return names if store is None else names.as_in(store.shapes)


def _locate_plain(path: Path) -> WeightFiles:
    """Detect the weights at `path`. Raises WeightsError if settings say that they are quantised or need an adapter."""
    found = locate(path)
    if found.kind == "gguf":
        return found
    Fields.read(found.config_file).refuse_quantisation()
    beside = [file for pattern in _BESIDE for file in sorted(path.glob(pattern))]
    if beside:
        raise WeightsError(
            f"{beside[0]}: these settings say that the weights are quantised or need an adapter; expected plain "
            "weights. Use the model's weights in bfloat16, a .gguf file, or the merged model. If the weights in the "
            "folder are plain, delete this file."
        )
    return found


def _sizes(
    found: WeightFiles, store: TensorStore | None, names: TensorNames, rope_scaling: RopeScalingChoice
) -> BackboneConfig:
    if isinstance(store, GgufStore):
        config = sizes_of_gguf(store, rope_scaling)
    else:
        fields = Fields.read(found.config_file)
        if found.kind == "native":
            config = sizes_of_native(fields, store, names, rope_scaling)
        else:
            config = sizes_of_hugging_face(fields, rope_scaling)
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    if num_heads % num_kv_heads:
        raise WeightsError(
            f"{found.config_file}: {num_heads} query heads cannot share {num_kv_heads} key heads evenly; "
            "expected a multiple. Copy the file from its source."
        )
    if config.head_dim % 2:
        raise WeightsError(f"{found.config_file}: head_dim is {config.head_dim}; rotary positions need an even one.")
    return config
