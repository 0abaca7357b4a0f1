"""The files of CEPED (arXiv 2402.16617): a Llama decoder with cross-attention and a small encoder in one folder.

`model/ceped.py` computes the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights.families import HUGGING_FACE, TensorNames
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import sizes_of_hugging_face
from arc_ds.model.weights.locate import locate
from arc_ds.model.weights.names import Shape, join_faults, shape_faults
from arc_ds.model.weights.stores import ALL_ROWS, JoinedStore, PickleStore, SafetensorsStore, TensorStore

_CROSS = "layers.{i}.cross_attention."
_NAMES: Mapping[str, TensorNames] = {
    "decoder": dataclasses.replace(
        HUGGING_FACE,
        table={
            **HUGGING_FACE.table,
            f"{_CROSS}norm": "model.layers.{i}.cross_attn.layernorm",
            **{f"{_CROSS}w{x}": f"model.layers.{{i}}.cross_attn.{x}_proj" for x in "qkvo"},
        },
    ),
    "encoder": dataclasses.replace(
        HUGGING_FACE,
        table={ours: "encoder." + theirs.removeprefix("model.") for ours, theirs in HUGGING_FACE.table.items()},
    ),
}
_TABLE = "rotary_emb.inv_freq"  # follows from the config


@dataclass(frozen=True, kw_only=True)
class CepedConfig:
    """The sizes of a CEPED model.

    decoder: the decoder, whose head sizes also hold for its cross-attention.
    encoder: the encoder.
    num_cross_layers: number of decoder layers with cross-attention, the last ones.
    """

    decoder: BackboneConfig
    encoder: BackboneConfig
    num_cross_layers: int


@dataclass(frozen=True, kw_only=True)
class CepedTensors:
    """The tensors of a CEPED model by the parameter names of `model.ceped.Ceped`. Only headers are read at first.

    path: its folder.
    shapes: shapes of all parameters.
    store: the tensors, by the names of the files.
    """

    path: Path
    shapes: Mapping[str, Shape]
    store: TensorStore

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a parameter, or a slice of its rows, to the CPU."""
        return self.store.tensor(name_in_file(name), rows)


def open_ceped_tensors(path: Path, expected: Mapping[str, Shape]) -> CepedTensors:
    """Open the safetensors files or `pytorch_model*.bin` of a folder with a CEPED model.

    expected: shapes of all parameters.

    Raises WeightsError if files are missing or damaged, or do not hold exactly these parameters.
    """
    files: list[TensorStore] = [SafetensorsStore(file) for file in locate(path).files]
    files = files or [PickleStore(file) for file in sorted(path.glob("pytorch_model*.bin"))]
    if not files:
        raise WeightsError(
            f"{path} holds a config.json but no weights; expected .safetensors files or pytorch_model*.bin. Copy the "
            "weights there."
        )
    store = JoinedStore(files)
    shapes = {name_in_file(name): shape for name, shape in expected.items()}
    faults = shape_faults(shapes, store.shapes)
    faults += [f"`{n}` is no part of it" for n in store.shapes if n not in shapes and not n.endswith(_TABLE)]
    if faults:
        raise WeightsError(
            f"{path} does not hold exactly the tensors of the CEPED model that its config.json describes: "
            f"{join_faults(faults)}. Copy the weights and config.json again from one source."
        )
    return CepedTensors(path=path, shapes=expected, store=store)


def read_ceped_config(path: Path) -> CepedConfig:
    """Read the sizes in a folder's config.json.

    Raises WeightsError if it is missing, or if it describes another model than CEPED: one without cross-attention, or
    one whose layers read several encoder layers.
    """
    fields = Fields.read(path / "config.json")
    fields.refuse_quantisation()
    if not fields.flag("do_cross_attention", False):
        raise WeightsError(
            f"{fields.where}: `do_cross_attention` is not true, so this is no CEPED model. Pass the folder of one, "
            "such as a copy of hyen/CEPED-LLaMA-2-Chat-7B."
        )
    fields.refuse("num_cross_attn_hidden_states", 1)
    fields.refuse("encoder_is_model")
    fields.refuse("encode_mode", "context_only")
    decoder, encoder = (_llama_sizes(part) for part in (fields, fields.object("encoder_config")))
    width = fields.integer("encoder_hidden_size", encoder.hidden_size)
    if width != encoder.hidden_size:
        raise fields.wrong("encoder_hidden_size", f"the encoder's hidden_size {encoder.hidden_size}", width)
    num_cross_layers = fields.integer("num_cross_attn_layers", decoder.num_layers)
    if num_cross_layers > decoder.num_layers:
        raise fields.wrong("num_cross_attn_layers", f"at most the {decoder.num_layers} layers", num_cross_layers)
    return CepedConfig(decoder=decoder, encoder=encoder, num_cross_layers=num_cross_layers)


def _llama_sizes(fields: Fields) -> BackboneConfig:
    return sizes_of_hugging_face(Fields({"model_type": "llama", **fields.values}, fields.where), "checkpoint")


def name_in_file(name: str) -> str:
    """Name in the files of a parameter of `model.ceped.Ceped`."""
    part, _, parameter = name.partition(".")
    return _NAMES[part].find(parameter)[0]
