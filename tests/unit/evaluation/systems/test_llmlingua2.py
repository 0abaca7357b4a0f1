"""LLMLingua-2 against the package llmlingua on a tiny random classifier."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiktoken.load
import torch
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

from arc_ds import ArcModel
from arc_ds.errors import ConfigError, DataError, WeightsError
from arc_ds.evaluation.protocol import CLEAN
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems import llmlingua2 as room
from arc_ds.evaluation.systems.kind import SystemSettings
from arc_ds.evaluation.systems.llmlingua2 import (
    Word,
    cl100k_counter,
    cl100k_file,
    cut_pieces,
    keep_words,
    llmlingua2,
    words_of,
)

WORDS = (
    *("the", "cat", "Paris", "is", "a", "city", "on", "river", "Seine", "München", "größe", "Москва", "столица"),
    *("北京", "是首都", "नमस्ते", "שלום", "1889", "3.5", "tower", "built", "for", "fair", "quickly", "don't", "A.B."),
    *("state-of-the-art", "e.g.", "unbelievably", "compressed", "vectors", "!!!", "(", ")", "--", "@user", "x=y,"),
    "🙂",
)
CPU = torch.device("cpu")
UNKNOWN = "☃"  # no token of the vocabulary
BLANK = " "  # its pieces have no tokens, for which the package finds no threshold
EDGES = (
    "",
    BLANK,
    "word",
    ".",
    "...",
    UNKNOWN,
    "a ☃ snowman ☃",
    "no full stop at all but several words",
    "First line\nsecond line\n\nthird. Fourth",
    string.punctuation,
    "the river, the river; the river: the river!",
    "北京是中国的首都。莫斯科是俄罗斯的首都。",
    "Москва — столица России, а Париж — Франции.",
    "  leading and   inner   space  ",
    "<s> literal </s> special <pad> <unk> <mask> tokens",
    "x" * 1300,
    "the cat is on the river " * 120,  # more than 510 tokens without a full stop
    "The tower was built in 1889 for a fair. " * 90,  # several pieces
    "a.b " * 400,
    "the cat is on the river\n " * 120,
    "Paris is a city. " * 30 + "cat " * 700 + "It is quick.",
)


def count(text: str) -> int:
    """A count of tokens that stands in for cl100k_base: a token for three bytes."""
    return -(-len(text.encode()) // 3)


class _Encoding:
    """The same counter with tiktoken's interface."""

    def encode(self, text: str) -> list[int]:
        return [0] * count(text)


def texts() -> list[str]:
    """200 texts of 1 to 300 words with punctuation, and the edge cases among them."""
    draw = random.Random(16)
    found = list(EDGES)
    while len(found) < 199:
        words = draw.choices(WORDS, k=int(300 ** draw.random()))
        ends = draw.choices(["", ".", ",", "?", "\n"], weights=[12, 2, 2, 1, 1], k=len(words))
        text = " ".join(word + end for word, end in zip(words, ends, strict=True))
        found += [text] if text not in found else []
    return [*found, "city <pad> ( compressed"]  # the classifier sees a literal "<pad>", unlike padding


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny XLM-RoBERTa with random weights. llmlingua finds the kind of model in the folder's name."""
    classifier = tmp_path_factory.mktemp("models") / "tiny-xlm-roberta-large"
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    known = [text.replace(UNKNOWN, "") for text in texts()[len(EDGES) :]]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*known, string.ascii_letters], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    ).save_pretrained(classifier)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    XLMRobertaForTokenClassification(config).save_pretrained(classifier)
    return classifier


class Selection(NamedTuple):
    """text: the compressed text. kept: the words that stayed. words: number of all words."""

    text: str
    kept: list[str]
    words: int


@pytest.fixture(scope="module")
def library(classifier: Path) -> Callable[[str, float], Selection]:
    """The package's own selection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "encoding_for_model", lambda _name: _Encoding())
        from llmlingua import PromptCompressor

        compressor = PromptCompressor(str(classifier), use_llmlingua2=True, device_map="cpu")

    def select(text: str, rate: float) -> Selection:
        result = compressor.compress_prompt_llmlingua2(text, rate=rate, return_word_label=True, word_sep="\0")
        lines = [line.rsplit(" ", 1) for line in result["fn_labeled_original_prompt"].split("\0") if line]
        return Selection(result["compressed_prompt"], [word for word, label in lines if label == "1"], len(lines))

    return select


@pytest.fixture
def ours(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Selection]:
    """Our selection, with the words that `keep_words` returns."""
    kept: list[str] = []
    seen: list[int] = []
    real = keep_words

    def watched(words: Any, rate: float, counter: Any) -> list[str]:
        found = real(words, rate, counter)
        kept.extend(word.lstrip("▁") for word in found)
        seen.append(len(words))
        return found

    monkeypatch.setattr(room, "keep_words", watched)
    by_rate = {rate: llmlingua2(classifier, rate=rate, count_tokens=count, device=CPU) for rate in (0.5, 0.25)}

    def select(text: str, rate: float) -> Selection:
        kept.clear()
        seen.clear()
        return Selection(by_rate[rate](text, ""), list(kept), sum(seen))

    return select


def test_the_ends_that_the_model_knows(
    classifier: Path, library: Callable[[str, float], Selection], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmlingua import prompt_compressor

    compress = llmlingua2(classifier, rate=0.5, count_tokens=count, device=CPU, ends="model")
    some = [text for text in texts()[:40] if text != BLANK]
    assert any(compress(text, "") != library(text, 0.5).text for text in some)
    repaired = partial(prompt_compressor.TokenClfDataset, model_name="xlm-roberta-large")
    monkeypatch.setattr(prompt_compressor, "TokenClfDataset", repaired)
    assert all(compress(text, "") == library(text, 0.5).text for text in some)


@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_the_same_words_as_the_package_on_200_texts(
    library: Callable[[str, float], Selection], ours: Callable[[str, float], Selection], rate: float
) -> None:
    lengths = [0, 0]
    for text in texts():
        found = ours(text, rate)
        if text == BLANK:
            assert found.text == ""
            with pytest.raises(IndexError):
                library(text, rate)
            continue
        assert found == library(text, rate), repr(text[:80])
        lengths = [lengths[0] + count(found.text), lengths[1] + count(text)]
    assert rate / 2 < lengths[0] / lengths[1] < rate * 1.2


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_PIECE_ENDS", (".",)),
        ("_MAX_TOKENS", 256),
        ("_WORD_START", "▁t"),
        ("keep_words", lambda words, rate, _count: keep_words(words, rate, lambda _text: 1)),
        ("keep_words", lambda words, rate, counter: keep_words(words, rate - 0.01, counter)),
    ],
)
def test_a_wrong_variant_keeps_other_words(
    classifier: Path, library: Callable[[str, float], Selection], monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(room, name, wrong)
    compress = llmlingua2(classifier, rate=0.5, count_tokens=count, device=CPU)
    some = [text for text in texts()[:40] if text != BLANK]
    assert any(compress(text, "") != library(text, 0.5).text for text in some)


def test_a_word_weighs_as_many_tokens_as_it_has() -> None:
    words = [Word("▁aaaaaaaaaaaa", np.float32(0.9)), Word("▁b", np.float32(0.5)), Word("▁c", np.float32(0.4))]
    assert keep_words(words, 0.5, lambda _text: 1) == ["▁aaaaaaaaaaaa"]
    assert keep_words(words, 0.5, len) == []  # the long word itself is the threshold
    certain = [word._replace(probability=np.float32(1.0)) for word in words]
    assert keep_words(certain, 0.5, len) == [word.text for word in words]


def test_a_full_stop_that_starts_a_piece_does_not_end_it() -> None:
    assert [len(piece) for piece in cut_pieces([".", *["a"] * 600, ".", "a"])] == [511, 92]
    assert [len(piece) for piece in cut_pieces(["a", ".", *["a"] * 600])] == [2, 511, 89]


def test_words_begin_at_marks_and_punctuation() -> None:
    tokens = ["<s>", "▁un", "believ", "ably", ",", "▁the", "<unk>", "-", "cat", "</s>"]
    words = words_of(tokens, [np.float32(idx / 10) for idx in range(10)], {"<s>", "</s>", "<unk>"})
    assert [word.text for word in words] == ["▁unbelievably", ",", "▁the", "-cat"]
    assert words[0].probability == pytest.approx(0.2) and words[3].probability == pytest.approx(0.75)


def test_without_its_file_the_counter_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        cl100k_counter()
    address = next(word for word in str(error.value).split() if word.startswith("https://"))
    assert str(cl100k_file()) in str(error.value)
    cl100k_file().write_bytes(b"the file")  # tiktoken finds it there
    assert tiktoken.load.read_file_cached(address) == b"the file"
    with pytest.raises(ConfigError, match="is damaged"):
        cl100k_counter()
    assert cl100k_file().exists()
    monkeypatch.setattr(room, "_CL100K_SHA256", hashlib.sha256(b"the file").hexdigest())
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _name: SimpleNamespace(encode_ordinary=str.split))
    assert cl100k_counter()("two words") == 2


def test_the_file_and_its_digest_are_those_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: (url, expected_hash))
    assert openai_public.cl100k_base()["mergeable_ranks"] == (room._CL100K, room._CL100K_SHA256)


def test_other_folders_are_refused(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json does not exist"):
        llmlingua2(tmp_path, rate=0.5, count_tokens=count, device=CPU)
    config = XLMRobertaConfig.from_pretrained(classifier)
    more_classes = XLMRobertaConfig.from_pretrained(classifier, num_labels=3)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    others = {
        "xlm-roberta with 3 classes": XLMRobertaForTokenClassification(more_classes),
        "xlm-roberta with 2 classes, without classifier.bias, classifier.weight": XLMRobertaModel(config),
        "bert with 2 classes": BertForTokenClassification(BertConfig(num_attention_heads=2, **sizes)),
    }
    for number, (found, other) in enumerate(others.items()):
        folder = tmp_path / str(number)
        other.save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(classifier).save_pretrained(folder)
        with pytest.raises(WeightsError, match=f"holds a {found}"):
            llmlingua2(folder, rate=0.5, count_tokens=count, device=CPU)


def test_a_lone_surrogate_is_refused(classifier: Path) -> None:
    with pytest.raises(DataError):
        llmlingua2(classifier, rate=0.5, count_tokens=count, device=CPU)("bad \ud800 text", "")


def test_the_kind_reads_documents_shortened(
    classifier: Path, folder: Path, model: ArcModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "cl100k_counter", lambda: count)
    kind = KINDS["llmlingua2"]
    section = kind.section(decoder=str(folder / "decoder"), classifier=str(classifier), rate=0.25, ends="model")
    settings = SystemSettings(name="words", protocol=CLEAN, seed=0, device=CPU, dtype=torch.float32)
    system = kind.build(section, settings)
    text = "The tower was built in 1889 for a fair. It stands on the river."
    sample = EvalSample(id="q", task="squad", passages=(text,), references=("1889",))
    parts = ("Document: ", Document(text), "\nAnswer:")
    (answer,) = system.answer([EvalPrompt(sample=sample, parts=parts, max_new_tokens=5, stop=())])
    options = {"count_tokens": count, "device": CPU}
    shorten = llmlingua2(classifier, rate=0.25, ends="model", **options)
    kept = shorten(text, "")
    assert kept not in {llmlingua2(classifier, rate=rate, **options)(text, "") for rate in (0.25, 0.5)}
    monkeypatch.setattr(room, "_classify", None)  # another question on the document needs no classifier
    assert shorten(text, "Which river?") == kept
    assert 0 < len(kept) < len(text)
    assert [answer.raw] == model.generate([f"Document: {kept}\nAnswer:"], max_new_tokens=5)
    assert system.describe().items() >= {"kind": "llmlingua2", "rate": 0.25, "ends": "model"}.items()
