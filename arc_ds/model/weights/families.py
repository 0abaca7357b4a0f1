"""Families of backbones as data: their differences from Llama, and the tensor names of each kind of file.

A new family is one entry of `FAMILIES`, and a `TensorNames` if its files use other names or stack other parameters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

_LAYER = re.compile(r"^layers\.(\d+)\.")
OLMO_PREFIX = "model.transformer."
OLMO_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Family:
    """The differences of a family from Llama.

    norm: see `BackboneConfig`.
    norm_eps: epsilon of the norms if it is a constant in the family's code, absent from its configs; None otherwise.
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "olmo": Family(norm="layer", norm_eps=OLMO_EPS),
}


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The tensor names of one family of files.

    name: name of the family of files, for messages.
    table: name in the file by internal name, both without `.weight` and with `{i}` for the layer. Parameters with the
        same name in the file are stacked there along dimension 0, in the order of the table.
    interleaved: whether wq and wk pair rotary dimensions (2i, 2i + 1).
    ignored: names of tensors in the file that hold no parameter and change nothing.
    """

    name: str
    table: Mapping[str, str]
    interleaved: bool
    ignored: tuple[str, ...] = ()

    def find(self, parameter: str) -> tuple[str, list[str]]:
        """The tensor in the file that holds a parameter, and the internal names of all parameters that it holds.

        Raises KeyError for an unknown name.
        """
        match = _LAYER.match(parameter)
        layer = match.group(1) if match else ""
        in_file = self.table[_LAYER.sub("layers.{i}.", parameter).removesuffix(".weight")]
        held = [internal for internal, other in self.table.items() if other == in_file]
        name, *held = (f"{n}.weight".replace("{i}", layer) for n in (in_file, *held))
        return name, held

    def as_in(self, found: Iterable[str]) -> TensorNames:
        """The same table with the prefixes that the files use.

        Wrappers of training libraries add prefixes. Encoders without a head lack one. The prefix is that of the
        embedding. The head may have its own.

        found: names in the files. If several embeddings or none are among them, the table stays as it is.
        """
        embedding, head = self.table["tok_embeddings"], self.table["output"]
        root, _, last = embedding.rpartition(".")
        root = f"{root}." if root else ""
        prefixes, head_prefixes = (_prefixes_of(name, found) for name in (last, head))
        if root in prefixes or len(prefixes) != 1:
            return self
        table = {ours: prefixes[0] + name.removeprefix(root) for ours, name in self.table.items()}
        if not head.startswith(root):
            table["output"] = (head_prefixes[0] if len(head_prefixes) == 1 else "") + head
        return dataclasses.replace(self, table=table)


def _prefixes_of(name: str, found: Iterable[str]) -> list[str]:
    """The prefixes under which a tensor is among the names in the files."""
    whole = re.compile(rf"(|.+\.){re.escape(name)}\.weight")
    return [match.group(1) for other in found if (match := whole.fullmatch(other))]


HUGGING_FACE = TensorNames(
    name="Hugging Face",
    table={
        "tok_embeddings": "model.embed_tokens",
        "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "layers.{i}.attention.wq": "model.layers.{i}.self_attn.q_proj",
        "layers.{i}.attention.wk": "model.layers.{i}.self_attn.k_proj",
        "layers.{i}.attention.wv": "model.layers.{i}.self_attn.v_proj",
        "layers.{i}.attention.wo": "model.layers.{i}.self_attn.o_proj",
        "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.feed_forward.w1": "model.layers.{i}.mlp.gate_proj",
        "layers.{i}.feed_forward.w2": "model.layers.{i}.mlp.down_proj",
        "layers.{i}.feed_forward.w3": "model.layers.{i}.mlp.up_proj",
        "norm": "model.norm",
        "output": "lm_head",
    },
    interleaved=False,
)

NATIVE = TensorNames(
    name="Meta/Mistral native",
    table={n: n for n in HUGGING_FACE.table},
    interleaved=True,
    ignored=("rope.freqs",),  # Meta's own program computes the frequencies from params.json, too
)

# The first half of ff_proj is the up projection: OLMo's SwiGLU takes the gate from the second half.
OLMO_NATIVE = TensorNames(
    name="OLMo native",
    table={
        "tok_embeddings": OLMO_PREFIX + "wte",
        "layers.{i}.attention.wq": OLMO_PREFIX + "blocks.{i}.att_proj",
        "layers.{i}.attention.wk": OLMO_PREFIX + "blocks.{i}.att_proj",
        "layers.{i}.attention.wv": OLMO_PREFIX + "blocks.{i}.att_proj",
        "layers.{i}.attention.wo": OLMO_PREFIX + "blocks.{i}.attn_out",
        "layers.{i}.feed_forward.w3": OLMO_PREFIX + "blocks.{i}.ff_proj",
        "layers.{i}.feed_forward.w1": OLMO_PREFIX + "blocks.{i}.ff_proj",
        "layers.{i}.feed_forward.w2": OLMO_PREFIX + "blocks.{i}.ff_out",
        "output": OLMO_PREFIX + "ff_out",
    },
    interleaved=False,
)
