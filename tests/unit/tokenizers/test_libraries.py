"""Ids and boundaries are the libraries' own, over texts that are hard to cut.

The oracle asks the library for ids and for the bytes of each token. It finds the boundaries by decoding every prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arc_ds.errors import DataError
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from arc_ds.tokenizers.tiktoken_file import LLAMA3_PATTERN
from tests.helpers.tiny_data import write_json_tokenizer, write_tiktoken, write_tokenizer_without
from tests.helpers.tokenizer_files import byte_characters, smollm2, write_sentencepiece_gguf

KINDS = [
    "json",
    "json without tab",
    "json with post-processor",
    "smollm2",
    "sentencepiece",
    "GGUF sentencepiece",
    "tiktoken",
]
TAB = 9
LITERAL_SPACE = "\u2581".encode()  # sentencepiece's own mark of a space, which comes out as a space
ANY = st.characters(exclude_categories=["Cs"])
PIECES = st.one_of(
    ANY,
    st.characters(categories=["Cc", "Zs", "Zl", "Zp"]),
    st.characters(categories=["Mn", "Mc", "Me"]).map(lambda mark: "e" + mark),
    st.builds(lambda mark, times: "a" + mark * times, st.characters(categories=["Mn"]), st.integers(2, 9)),
    st.builds(
        lambda character, times: character * times, st.one_of(st.sampled_from(" \n\ta=-0é北"), ANY), st.integers(2, 70)
    ),
    st.sampled_from(["the ", " tower", "don't", " WE'LL", "12,345", "👩‍👩‍👧", "🇫🇷", "한국어", "of grey stone", "\r\n"]),
    st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|begin_of_text|>", "[INST]", "<unk>", "<0x0A>", "<|endoftext|>"]),
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)


class Oracle(NamedTuple):
    """A library's reading of a file.

    encode: the ids of a text.
    bytes_of: the bytes of an id.
    lead: bytes that the tokenizer adds before a text.
    missing: parts of UTF-8 that no token spells.
    """

    encode: Callable[[str], list[int]]
    bytes_of: Callable[[int], bytes]
    lead: int = 0
    missing: Sequence[bytes] = ()

    def ends(self, text: str, ids: list[int]) -> list[int]:
        """`Encoding.ends` of the text: how many of its characters each prefix of ids decodes to."""
        ends, spelled = [0], b""
        for idx in ids:
            spelled += self.bytes_of(idx)
            try:
                ends.append(len(spelled[self.lead :].decode("utf-8")))
            except UnicodeDecodeError:
                ends.append(ends[-1])
        assert spelled[self.lead :] == text.encode("utf-8")
        return ends

    def is_spelled(self, text: str) -> bool:
        """Whether the tokens of the text spell it."""
        return not any(part in text.encode("utf-8") for part in self.missing)


def json_oracle(path: Path) -> Oracle:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.encode_special_tokens = True
    names = byte_characters()
    byte_of = {character: byte for byte, character in enumerate(names)}
    return Oracle(
        lambda text: backend.encode(text, add_special_tokens=False).ids,
        lambda idx: bytes(byte_of[character] for character in backend.id_to_token(idx)),
        missing=[bytes([byte]) for byte, name in enumerate(names) if backend.token_to_id(name) is None],
    )


def sentencepiece_oracle(path: Path) -> Oracle:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def bytes_of(idx: int) -> bytes:
        piece = processor.id_to_piece(idx)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(idx) else piece.replace("\u2581", " ").encode()

    return Oracle(processor.encode, bytes_of, lead=1, missing=[LITERAL_SPACE])


def tiktoken_oracle(path: Path) -> Oracle:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(path))
    encoding = tiktoken.Encoding("oracle", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Oracle(encoding.encode_ordinary, encoding.decode_single_token_bytes)


class Case(NamedTuple):
    tokenizer: Tokenizer
    oracle: Oracle


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tokenizers")
    if request.param == "tiktoken":
        path = write_tiktoken(folder / "tokenizer.model")
        return Case(load_tokenizer(path), tiktoken_oracle(path))
    if request.param == "sentencepiece":
        path = request.getfixturevalue("golden") / "tokenizers" / "sp384.model"
        return Case(load_tokenizer(path), sentencepiece_oracle(path))
    if request.param == "GGUF sentencepiece":
        path = request.getfixturevalue("golden") / "tokenizers" / "sp512.model"
        return Case(load_tokenizer(write_sentencepiece_gguf(folder / "a.gguf", path)), sentencepiece_oracle(path))
    if request.param == "smollm2":
        tokenizer = load_tokenizer(smollm2())
        tokenizer.save(folder)
        return Case(tokenizer, json_oracle(folder / "tokenizer.json"))
    path = write_json_tokenizer(folder) / "tokenizer.json"
    if request.param == "json without tab":
        write_tokenizer_without(folder, TAB)
    if request.param == "json with post-processor":  # it takes spaces from the characters of a token
        processor = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": processor}))
    return Case(load_tokenizer(path), json_oracle(path))


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example("e\u0301\u0323\u0301 \U0001f6b2\U00011de0\x00\x85\ufeff\t\t")
@example("the tower of grey stone. " * 40)
def test_ids_and_boundaries_are_the_library_s(case: Case, text: str) -> None:
    ids = case.oracle.encode(text)
    encoding = case.tokenizer.encode_with_ends(text)
    assert case.tokenizer.encode(text) == encoding.ids.tolist() == ids
    assert case.tokenizer.encode_batch(["a", text]) == [case.tokenizer.encode("a"), ids]
    assert encoding.ids.dtype == encoding.ends.dtype == np.int64
    if case.oracle.is_spelled(text):
        assert encoding.ends.tolist() == case.oracle.ends(text, ids)
        assert case.tokenizer.decode(ids) == text
    else:  # a library does not say how many characters it left out
        assert len(encoding.ends) == len(ids) + 1 and (np.diff(encoding.ends) >= 0).all()
        assert encoding.ends[-1] == len(text) and (encoding.ends[:-1] < len(text)).all()


def test_special_tokens_are_text_wherever_they_stand(case: Case) -> None:
    for name, idx in [*case.tokenizer.special_ids.items()][:40]:
        for text in (name, f"the {name} tower", name * 3):
            encoding = case.tokenizer.encode_with_ends(text)
            assert idx not in encoding.ids
            assert encoding.ends.tolist() == case.oracle.ends(text, encoding.ids.tolist())
            assert case.tokenizer.decode([idx, *encoding.ids.tolist(), idx]) == text


def test_a_lone_surrogate_is_a_data_error(case: Case) -> None:
    """Data workers count a text that raises DataError as the record's fault; any other type would end the run."""
    tokenizer, text = case.tokenizer, "the \ud83d tower"
    for encode in (tokenizer.encode, tokenizer.encode_with_ends, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match=r"UTF-8 cannot encode: '\\ud83d' at character 4"):
            encode(text)
