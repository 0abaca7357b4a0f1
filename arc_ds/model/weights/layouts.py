"""Tables that map internal parameter names to tensor names in files, one table per family of files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LAYER = re.compile(r"^layers\.(\d+)\.")
OLMO_PREFIX = "model.transformer."


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The location of one internal parameter in a file.

    file_name: tensor name in the file, with `{i}` for the layer.
    stacked: if the file's tensor stacks several parameters along dimension 0, their internal names in that order, with
        `{i}` for the layer. Otherwise empty.
    """

    file_name: str
    stacked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensor names of one family of files.

    name: name of the family, for messages.
    rules: rule of each internal parameter.
    interleaved: whether wq and wk pair rotary dimensions (2i, 2i + 1).
    """

    name: str
    rules: Mapping[str, Rule]
    interleaved: bool

    def rule(self, internal_name: str) -> Rule:
        """The rule of a parameter, with the layer number filled in. Raises KeyError for an unknown name."""
        match = _LAYER.match(internal_name)
        if match is None:
            return self.rules[internal_name]
        i = match.group(1)
        rule = self.rules[_LAYER.sub("layers.{i}.", internal_name)]
        return Rule(
            file_name=rule.file_name.replace("{i}", i), stacked=tuple(s.replace("{i}", i) for s in rule.stacked)
        )


def _plain(names: Mapping[str, str]) -> dict[str, Rule]:
    return {internal: Rule(file_name=file_name) for internal, file_name in names.items()}


_INTERNAL_NAMES = (
    "tok_embeddings.weight",
    "layers.{i}.attention_norm.weight",
    "layers.{i}.attention.wq.weight",
    "layers.{i}.attention.wk.weight",
    "layers.{i}.attention.wv.weight",
    "layers.{i}.attention.wo.weight",
    "layers.{i}.ffn_norm.weight",
    "layers.{i}.feed_forward.w1.weight",
    "layers.{i}.feed_forward.w2.weight",
    "layers.{i}.feed_forward.w3.weight",
    "norm.weight",
    "output.weight",
)

NATIVE = Layout(name="Meta/Mistral native", rules=_plain({n: n for n in _INTERNAL_NAMES}), interleaved=True)

HUGGING_FACE = Layout(
    name="Hugging Face",
    rules=_plain(
        {
            "tok_embeddings.weight": "model.embed_tokens.weight",
            "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
            "layers.{i}.attention.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
            "layers.{i}.attention.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
            "layers.{i}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
            "layers.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
            "layers.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
            "layers.{i}.feed_forward.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
            "layers.{i}.feed_forward.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
            "layers.{i}.feed_forward.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
            "norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
    ),
    interleaved=False,
)

# For the llama architecture, llama.cpp's converter permutes wq and wk back to Meta's pairs.
GGUF_LLAMA = Layout(
    name="GGUF llama",
    rules=_plain(
        {
            "tok_embeddings.weight": "token_embd.weight",
            "layers.{i}.attention_norm.weight": "blk.{i}.attn_norm.weight",
            "layers.{i}.attention.wq.weight": "blk.{i}.attn_q.weight",
            "layers.{i}.attention.wk.weight": "blk.{i}.attn_k.weight",
            "layers.{i}.attention.wv.weight": "blk.{i}.attn_v.weight",
            "layers.{i}.attention.wo.weight": "blk.{i}.attn_output.weight",
            "layers.{i}.ffn_norm.weight": "blk.{i}.ffn_norm.weight",
            "layers.{i}.feed_forward.w1.weight": "blk.{i}.ffn_gate.weight",
            "layers.{i}.feed_forward.w2.weight": "blk.{i}.ffn_down.weight",
            "layers.{i}.feed_forward.w3.weight": "blk.{i}.ffn_up.weight",
            "norm.weight": "output_norm.weight",
            "output.weight": "output.weight",
        }
    ),
    interleaved=True,
)

_OLMO_ATTENTION = Rule(
    file_name=OLMO_PREFIX + "blocks.{i}.att_proj.weight",
    stacked=tuple("layers.{i}.attention." + w + ".weight" for w in ("wq", "wk", "wv")),
)
# The first half of ff_proj is the up projection: OLMo's SwiGLU takes the gate from the second half.
_OLMO_FFN = Rule(
    file_name=OLMO_PREFIX + "blocks.{i}.ff_proj.weight",
    stacked=("layers.{i}.feed_forward.w3.weight", "layers.{i}.feed_forward.w1.weight"),
)

OLMO_NATIVE = Layout(
    name="OLMo native",
    rules={
        "tok_embeddings.weight": Rule(file_name=OLMO_PREFIX + "wte.weight"),
        "layers.{i}.attention.wq.weight": _OLMO_ATTENTION,
        "layers.{i}.attention.wk.weight": _OLMO_ATTENTION,
        "layers.{i}.attention.wv.weight": _OLMO_ATTENTION,
        "layers.{i}.attention.wo.weight": Rule(file_name=OLMO_PREFIX + "blocks.{i}.attn_out.weight"),
        "layers.{i}.feed_forward.w1.weight": _OLMO_FFN,
        "layers.{i}.feed_forward.w2.weight": Rule(file_name=OLMO_PREFIX + "blocks.{i}.ff_out.weight"),
        "layers.{i}.feed_forward.w3.weight": _OLMO_FFN,
        "output.weight": Rule(file_name=OLMO_PREFIX + "ff_out.weight"),
    },
    interleaved=False,
)
