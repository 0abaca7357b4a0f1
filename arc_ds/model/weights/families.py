"""Families of backbones as data: their differences from Llama, and the tensor names of each kind of file.

A new family is one entry of `FAMILIES`, and a `TensorNames` if its files use other names or stack other parameters.
Its test is one entry of `CASES` in tests/parity/test_transformers.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from arc_ds.model.backbone_config import RopeKind
from arc_ds.model.weights.fields import Fields

_LAYER = re.compile(r"^layers\.(\d+)\.")
OLMO_PREFIX = "model.transformer."
OLMO_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The tensor names of one family of files.

    name: name of the family of files, for messages.
    table: name in the file by internal name, both without `.weight` or `.bias` and with `{i}` for the layer. Parameters
        with the same name in the file are stacked there along dimension 0, in the order of the table.
    interleaved: whether wq and wk pair rotary dimensions (2i, 2i + 1).
    ignored: names of tensors in the file that hold no parameter and change nothing.
    other_modules: pattern of names of tensors of other modules, such as a vision tower. A text does not pass them.
    """

    name: str
    table: Mapping[str, str]
    interleaved: bool
    ignored: tuple[str, ...] = ()
    other_modules: re.Pattern[str] | None = None

    def find(self, parameter: str) -> tuple[str, list[str]]:
        """The tensor in the file that holds a parameter, and the internal names of all parameters that it holds.

        Raises KeyError for an unknown name.
        """
        match = _LAYER.match(parameter)
        layer = match.group(1) if match else ""
        module, _, kind = _LAYER.sub("layers.{i}.", parameter).rpartition(".")
        in_file = self.table[module]
        held = [internal for internal, other in self.table.items() if other == in_file]
        name, *held = (f"{n}.{kind}".replace("{i}", layer) for n in (in_file, *held))
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
        "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
        "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
        "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.feed_forward.w1": "model.layers.{i}.mlp.gate_proj",
        "layers.{i}.feed_forward.w2": "model.layers.{i}.mlp.down_proj",
        "layers.{i}.feed_forward.w3": "model.layers.{i}.mlp.up_proj",
        "norm": "model.norm",
        "output": "lm_head",
    },
    interleaved=False,
)

# Files of OLMo 2 and 3 name the norms after attention and feed-forward by their place.
HUGGING_FACE_OLMO2 = dataclasses.replace(
    HUGGING_FACE,
    table={
        **HUGGING_FACE.table,
        "layers.{i}.attention_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.ffn_norm": "model.layers.{i}.post_feedforward_layernorm",
    },
)

HUGGING_FACE_PHI3 = dataclasses.replace(
    HUGGING_FACE,
    table={
        **HUGGING_FACE.table,
        "layers.{i}.attention.wq": "model.layers.{i}.self_attn.qkv_proj",
        "layers.{i}.attention.wk": "model.layers.{i}.self_attn.qkv_proj",
        "layers.{i}.attention.wv": "model.layers.{i}.self_attn.qkv_proj",
        "layers.{i}.feed_forward.w1": "model.layers.{i}.mlp.gate_up_proj",
        "layers.{i}.feed_forward.w3": "model.layers.{i}.mlp.gate_up_proj",
    },
)

# Models of images or sound hold their language model as a module with a prefix of its own. `as_in` finds the prefix.
OTHER_MODULES = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|visual|image_newline|audio_tower|multi_modal_projector|"
    r"mm_projector|connector)(\.|$)"
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

LayerRule = Callable[[Fields, int], bool]


def _every_layer(_fields: Fields, _layer_idx: int) -> bool:
    return True


def _three_of_four(_fields: Fields, layer_idx: int) -> bool:
    return (layer_idx + 1) % 4 != 0


def _from_max_window_layers(fields: Fields, layer_idx: int) -> bool:
    return layer_idx >= fields.integer("max_window_layers", 28, minimum=0)


def _without_rope(fields: Fields, layer_idx: int) -> bool:
    """SmolLM3: the layers whose flag in `no_rope_layers` is 0, else every `no_rope_layer_interval`-th one."""
    flags = fields.get("no_rope_layers")
    if flags is None:
        return (layer_idx + 1) % fields.integer("no_rope_layer_interval", 4) == 0
    if not isinstance(flags, list) or len(flags) <= layer_idx or flags[layer_idx] not in (0, 1):
        raise fields.wrong("no_rope_layers", "a list of 0 or 1 for each layer", flags)
    return not flags[layer_idx]


def layers_of(rule: LayerRule | None, fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Indices of the layers to which a rule applies; none without a rule."""
    return () if rule is None else tuple(idx for idx in range(num_layers) if rule(fields, idx))


@dataclass(frozen=True, kw_only=True)
class Family:
    """The differences of a family from Llama, and the keys of its config.json. For the fields of the same name, see
    `BackboneConfig`.

    norm_eps: epsilon of the norms if it is a constant in the family's code, absent from its configs; None otherwise.
    qkv_bias: whether there are biases, or the key that says so.
    output_bias: the same.
    ffn_bias: the same.
    numbers: key of the config by field of `BackboneConfig`, for numbers that a config may lack.
    logits_divisor: key of the inverse of `logits_multiplier`; None if there is none.
    windowed: which layers have a window if the config has a length but no `layer_types`; None if the family has no
        windows, even with a length in the config.
    without_rope: which layers rotate nothing; None for no layer.
    windowed_rope_scaling: used if the config has one rotary rule for all layers.
    partial_rotary: whether the family honours `partial_rotary_factor`.
    rope_kinds: other names of rotary scalings.
    defaults: values of keys that a config.json may lack, if they differ from Llama's. A key with null is not missing.
    names: tensor names of the family's Hugging Face folders.
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["input", "output"] = "input"
    norm_eps: float | None = None
    qk_norm: Literal["head", "row"] | None = None
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    ffn_bias: bool | str = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    logits_divisor: str | None = None
    windowed: LayerRule | None = None
    without_rope: LayerRule | None = None
    windowed_rope_scaling: bool = True
    partial_rotary: bool = False
    rope_kinds: Mapping[str, RopeKind] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: TensorNames = HUGGING_FACE


_ATTENTION_BIAS: Mapping[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}

# Facts from the configuration classes and the models of transformers 5.23.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(**_ATTENTION_BIAS, ffn_bias="mlp_bias"),
    "mistral": Family(windowed=_every_layer, defaults={"sliding_window": 4096}),
    "ministral": Family(windowed=_every_layer, defaults={"sliding_window": 4096}),
    "ministral3": Family(windowed=_every_layer, defaults={"head_dim": 128, "rms_norm_eps": 1e-5}),
    "olmo": Family(norm="layer", norm_eps=OLMO_EPS, **_ATTENTION_BIAS, numbers={"clip_qkv": "clip_qkv"}),
    "olmo2": Family(
        norm_place="output",
        qk_norm="row",
        **_ATTENTION_BIAS,
        defaults={"rms_norm_eps": 1e-5},
        names=HUGGING_FACE_OLMO2,
    ),
    "olmo3": Family(
        norm_place="output",
        qk_norm="row",
        **_ATTENTION_BIAS,
        windowed=_three_of_four,
        windowed_rope_scaling=False,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
        names=HUGGING_FACE_OLMO2,
    ),
    "qwen2": Family(
        qkv_bias=True,
        windowed=_from_max_window_layers,
        defaults={"use_sliding_window": False, "sliding_window": 4096},
    ),
    "qwen3": Family(
        qk_norm="head",
        **_ATTENTION_BIAS,
        windowed=_from_max_window_layers,
        defaults={"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
    ),
    "smollm3": Family(
        **_ATTENTION_BIAS,
        ffn_bias="mlp_bias",
        windowed=_without_rope,
        without_rope=_without_rope,
        defaults={"rope_theta": 2000000.0, "use_sliding_window": False, "tie_word_embeddings": True},
    ),
    "granite": Family(
        **_ATTENTION_BIAS,
        ffn_bias="mlp_bias",
        numbers={
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_scale": "attention_multiplier",
        },
        logits_divisor="logits_scaling",
        defaults={"attention_multiplier": 1.0},
    ),
    "phi3": Family(
        windowed=_every_layer,
        partial_rotary=True,
        rope_kinds={"su": "longrope", "yarn": "longrope"},
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        names=HUGGING_FACE_PHI3,
    ),
}
