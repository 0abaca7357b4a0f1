"""Whether tiktoken's merging comes to the ids of a byte-level BPE of the `tokenizers` library, and its engine.

The library merges by a list of pairs, in the list's order; tiktoken merges any neighbours whose joined bytes are a
token. Two kinds of lists come to the same.

Lists that were written from tiktoken's ranks (Llama 3) hold, token after token, every pair that makes it: then both
choose among the same pairs by the same order. (Where two pairs of one token overlap, as in a·aa·a, the list's order
would decide in one and the place in the other; the model was trained with tiktoken's.)

Trained lists (GPT-2, OLMo, Qwen, SmolLM) have one pair for each token. They agree where (1) each token is made by one
pair, (2) of parts that stand earlier in the list, and (3) each token, taken alone, comes out as itself. For by (2)
merges happen in rising order, so the merges inside a span that no merge has crossed are those of the span taken alone;
if the span is a token's text and has come down to two parts, by (3) the next merge of the span alone must be the pair
of (1). So every pair that tiktoken would merge is in the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arc_ds.tokenizers.engine import (
    DIGITS_APART_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    BytePairEngine,
    engine_library,
)


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether the tokens of a tokenizer.json spell the bytes of a text (in NFC, where it normalises) one for one."""
    normalizer = spec.get("normalizer")
    is_plain = normalizer is None or normalizer.get("type") == "NFC"
    return is_plain and any(s.get("type") == "ByteLevel" and not s.get("add_prefix_space") for s in _splitters(spec))


def build_engine(backend: Any, spec: dict[str, Any]) -> BytePairEngine | None:
    """The engine of a byte-level tokenizer; None where it is not sure to give the library's ids.

    Ids are -1 for bytes without a token (SmolLM2 has none for some control characters), which the library leaves out.
    """
    library, pattern, model = engine_library(), _pattern(_splitters(spec)), spec["model"]
    unknown_rules = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    matched_in_text = any(not token["special"] for token in added.values())
    if library is None or pattern is None or model.get("type") != "BPE" or unknown_rules or matched_in_text:
        return None
    vocabulary = {token: idx for token, idx in model["vocab"].items() if token not in added}
    takes_whole_words = bool(model.get("ignore_merges"))
    made = _trained(backend, model["merges"], vocabulary, takes_whole_words)
    if made is None and takes_whole_words:
        made = _written_from_ranks(model["merges"], vocabulary)
    if made is None:
        return None
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    tokens = [*bytes_of, *made]
    return BytePairEngine(
        library,
        pattern=pattern,
        ranks={bytes(bytes_of[character] for character in token): rank for rank, token in enumerate(tokens)},
        ids=np.array([vocabulary.get(token, -1) for token in tokens], dtype=np.int64),
    )


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _splitters(spec: dict[str, Any]) -> list[dict[str, Any]]:
    splitter = spec.get("pre_tokenizer") or {}
    return splitter.get("pretokenizers", [splitter])


def _pattern(splitters: list[dict[str, Any]]) -> str | None:
    """The one pattern that splits as these do, None where none is known."""
    *before, last = splitters
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return GPT2_PATTERN
        digits_apart = len(before) == 1 and before[0].get("type") == "Digits" and before[0].get("individual_digits")
        return DIGITS_APART_PATTERN if digits_apart else None
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    pattern, behavior = before[0].get("pattern", {}).get("Regex"), before[0].get("behavior")
    keeps_matches = (behavior, bool(before[0].get("invert"))) in (("Isolated", False), ("Removed", True))
    return pattern if keeps_matches and pattern in (LLAMA3_PATTERN, QWEN2_PATTERN) else None


def _trained(
    backend: Any, merges: Sequence[Any], vocabulary: Mapping[str, int], takes_whole_words: bool
) -> list[str] | None:
    """The token of each merge of a trained list; None where one of its conditions fails or a token has no id.

    takes_whole_words: the library takes a word that is a token without merging, as tiktoken does: then every token has
    to be among the merges.
    """
    known = dict.fromkeys(byte_characters())
    made = []
    for first, second in map(_pair, merges):
        token = first + second
        if token in known or token not in vocabulary or not {first, second} <= known.keys():
            return None
        known[token] = None
        made.append(token)
    if takes_whole_words and not vocabulary.keys() <= known.keys():
        return None
    return made if _come_out_as_themselves(backend, made) else None


def _written_from_ranks(merges: Sequence[Any], vocabulary: Mapping[str, int]) -> list[str] | None:
    """The tokens of longer than a byte in the order of a list written from ranks; None where the list is another."""
    pairs: dict[str, set[str]] = {}
    last = None
    for first, second in map(_pair, merges):
        token = first + second
        if token != last and token in pairs:
            return None
        pairs.setdefault(token, set()).add(first)
        last = token
    characters = {*byte_characters()}
    unmade = [token for token in vocabulary if len(token) > 1 and token not in pairs]
    for token in (*pairs, *unmade):
        cuts = range(1, len(token))
        firsts = {token[:cut] for cut in cuts if token[:cut] in vocabulary and token[cut:] in vocabulary}
        if token not in vocabulary or firsts != pairs.get(token, set()) or not characters.issuperset(token):
            return None
    return [*pairs, *unmade]


def _pair(merge: Any) -> tuple[str, str]:
    """The two parts of an entry of the list: a pair, or both in one text with a space between."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _come_out_as_themselves(backend: Any, tokens: list[str]) -> bool:
    """Condition (3), asked of the library, which must not take a whole word that is a token without merging."""
    model = backend.model
    takes_whole_words = model.ignore_merges
    model.ignore_merges = False
    try:
        return all(len(model.tokenize(token)) == 1 for token in tokens)
    finally:
        model.ignore_merges = takes_whole_words
