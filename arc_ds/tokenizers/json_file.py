"""Tokenizers of the Hugging Face `tokenizers` library (tokenizer.json)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import TokenizerError
from arc_ds.tokenizers.base import (
    COPY_AGAIN,
    Encoding,
    Tokenizer,
    checked,
    read_settings,
    require,
    settle_ends,
    sha256_of,
)

_MARK = re.compile(r"<.*[^\W\d_].*>|\[.*[^\W\d_].*\]", re.DOTALL)
# HTML tags, which some tokenizers (Gemma) list as tokens for ordinary text. <s> is not one of them: </s> ends a text.
_HTML = re.compile(
    r"</?(a|b|blockquote|br|caption|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|span|strong|su[bp]|t[dhr]|table|tbody|tfoot"
    r"|thead|u|ul)>"
)

_RARE = "\U0002a6a5"  # a character that few vocabularies hold


def is_mark(token: str) -> bool:
    """Whether an added token looks like a control token, even if its file does not list it as special.

    Many files do not list the marks of roles and tools as special (`<|User|>`, `<think>`, `[INST]`), yet inside a
    user's text these must remain text. A mark has angle or square brackets with a letter between them, and is not an
    HTML tag. All other added tokens are words to the model, such as runs of spaces (GPT-NeoX, OLMo).
    """
    return _MARK.fullmatch(token) is not None and _HTML.fullmatch(token) is None


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    backend: a `tokenizers.Tokenizer` in which every mark (`is_mark`) is a special token.
    definition: the text of tokenizer.json, which `save` writes; None if the backend was not read from one.
    """

    def __init__(
        self, backend: Any, *, bos_id: int | None, eos_id: int | None, fingerprint: str, definition: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|im_end|>" in a user's text is text
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.fingerprint = fingerprint
        self._definition = definition
        added_tokens = backend.get_added_tokens_decoder().items()
        self.special_ids: Mapping[str, int] = {added.content: idx for idx, added in added_tokens if added.special}
        self.text_vocab_size = self._text_vocab_size()

    @classmethod
    def from_spec(cls, path: Path, definition: str, spec: Any) -> JsonTokenizer:
        """Read the content of tokenizer.json; bos and eos come from the files next to it. TokenizerError if damaged."""
        library = require("tokenizers", path)
        if not isinstance(spec, dict) or "model" not in spec:
            raise TokenizerError(
                f"tokenizer {path}: expected the key `model` of a Hugging Face tokenizer.json, got the keys "
                f"{sorted(spec)[:6]}. Give the folder's tokenizer.json or tokenizer.model."
            )
        backend = library.Tokenizer.from_str(json.dumps(spec) if _make_marks_special(spec) else definition)
        try:
            backend.encode(_RARE, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more specific
            raise TokenizerError(
                f"tokenizer {path} cannot encode every text: {error}. Give a tokenizer with an unknown token (key "
                "`unk_token` or `unk_id` of its `model`) that is in its vocabulary, such as that of the model's page."
            ) from error
        bos_id, eos_id = _special_ids(path.parent, backend)
        backend.post_processor = spec["post_processor"] = None  # it adds specials and trims spaces from offsets
        canonical = json.dumps(spec, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
        marks = json.dumps([bos_id, eos_id]).encode()
        fingerprint = sha256_of(b"json", canonical, marks)
        return cls(backend, bos_id=bos_id, eos_id=eos_id, fingerprint=fingerprint, definition=definition)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast([checked(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_ends(self, text: str) -> Encoding:
        encoding = self._backend.encode(checked(text), add_special_tokens=False)
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Encoding(np.array(encoding.ids, dtype=np.int64), _ends_from_spans(spans, len(text)))

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._definition or self._backend.to_str(), encoding="utf-8")
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: None if idx is None else self._backend.id_to_token(idx) for name, idx in ids.items()},
            "add_bos_token": self.bos_id is not None,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _text_vocab_size(self) -> int:
        """A text gives a special token's id only if the model's own vocabulary holds it (WordLevel, Unigram)."""
        special = set(self.special_ids.values())
        ids = [idx for idx in self._backend.get_vocab(with_added_tokens=True).values() if idx not in special]
        ids += [idx for token, idx in self.special_ids.items() if idx in self.encode(token)]
        return 1 + max(ids, default=-1)


def _ends_from_spans(spans: NDArray[np.int64], num_characters: int) -> NDArray[np.int64]:
    """Boundaries [N + 1] from character spans [N, 2]; several tokens of one character share its span."""
    ends = np.zeros(len(spans) + 1, dtype=np.int64)
    if len(spans):
        reached = np.maximum.accumulate(spans[:, 1])
        ahead = np.minimum.accumulate(spans[::-1, 0])[::-1]
        ends[1:-1] = np.where(reached[:-1] <= ahead[1:], reached[:-1], -1)
    return settle_ends(ends, num_characters)


def _make_marks_special(spec: dict[str, Any]) -> bool:
    """Turn the marks among the added tokens into special tokens. Returns whether any was changed."""
    ordinary = (added for added in spec.get("added_tokens") or [] if not added.get("special"))
    marks = [added for added in ordinary if is_mark(added["content"])]
    for added in marks:
        added["special"] = True
    return bool(marks)


def _special_ids(folder: Path, backend: Any) -> tuple[int | None, int | None]:
    """(bos, eos) of a Hugging Face folder. bos is None if the model's own texts do not start with it."""
    settings = read_settings(folder / "tokenizer_config.json")
    config = read_settings(folder / "config.json")

    def id_of(name: str) -> int | None:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return backend.token_to_id(_checked(token, str, folder / "tokenizer_config.json", f"{name}_token"))
        value = config.get(f"{name}_token_id")
        value = next(iter(value), None) if isinstance(value, list) else value
        return None if value is None else _checked(value, int, folder / "config.json", f"{name}_token_id")

    bos_id, eos_id = id_of("bos"), id_of("eos")
    added = backend.encode("", add_special_tokens=True).ids
    begins_with_bos = settings.get("add_bos_token")
    if begins_with_bos is None:
        begins_with_bos = bos_id in added[:1]
    return (bos_id if begins_with_bos else None), eos_id


def _checked(value: Any, kind: type, path: Path, key: str) -> Any:
    """The value of a key; TokenizerError if it is not of the type `kind`, str or int."""
    if type(value) is not kind:
        expected = "a text" if kind is str else "a whole number"
        raise TokenizerError(f"{path}: `{key}` is {value!r}, expected {expected}. {COPY_AGAIN}")
    return value
