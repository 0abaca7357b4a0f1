"""LLMLingua-2 (Pan et al., arXiv 2403.12968): a token classifier chooses the words of a document that stay.

It keeps the same words as `llmlingua.PromptCompressor(use_llmlingua2=True)` with an XLM-RoBERTa and default options.
"""

from __future__ import annotations

import hashlib
import os
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch

from arc_ds.config.ranges import Range
from arc_ds.config.schema import FilePath
from arc_ds.errors import ConfigError, WeightsError
from arc_ds.evaluation.systems.decoder_system import DecoderSection, TextSystem, text_system
from arc_ds.evaluation.systems.kind import SystemKind, SystemSettings
from arc_ds.inference.weight_samples import sample_digest
from arc_ds.system.user_files import check_encodable, library_reads

_MAX_TOKENS = 512  # of a piece, with the tokens that start and end it
_BATCH_SIZE = 50  # pieces
_PIECE_ENDS = (".", "\n")
_WORD_START = "▁"
_CL100K = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
_CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_NUM_KEPT = 1 << 16  # compressed documents: a plan reads all of a task before the first is answered

CountTokens = Callable[[str], int]
Ends = Literal["library", "model"]


class Word(NamedTuple):
    """A word of a document, and the probability that it stays: the mean over its tokens."""

    text: str
    probability: np.float32


def llmlingua2(
    folder: Path,
    *,
    rate: float,
    count_tokens: CountTokens,
    ends: Ends = "library",
    device: torch.device,
) -> Callable[[str, str], str]:
    """The text that replaces a document: a function of the document and the question, which it ignores.

    It keeps the texts of documents that it has read.

    folder: an XLM-RoBERTa for token classification with its tokenizer, such as a copy of
        microsoft/llmlingua-2-xlm-roberta-large-meetingbank. Class 1 means that a token stays.
    rate: share of tokens that stay, above 0 and below 1. The paper's baselines use 1/2 and 1/4.
    count_tokens: number of tokens of a word, which weighs it in the threshold. The published results use
        `cl100k_counter`.
    ends: the tokens around each piece. "library": unknown tokens, because llmlingua 0.2.2 asks the tokenizer for
        "[CLS]" and "[SEP]", which XLM-RoBERTa does not have (microsoft/LLMLingua#181). Published results of the package
        were made so. "model": "<s>" and "</s>", as in the training of the classifier.
    device: where the classifier runs.

    Raises WeightsError if the folder holds no such model.
    """
    model, tokenizer = _load(folder, device)
    unknown = tokenizer.unk_token_id
    around = (unknown, unknown) if ends == "library" else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    skipped = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}

    @lru_cache(_NUM_KEPT)
    def compress(document: str) -> str:
        tokens = tokenizer.tokenize(check_encodable(document, "a document"))
        pieces = [tokenizer.convert_tokens_to_string(piece) for piece in cut_pieces(tokens)]
        texts = []
        for first in range(0, len(pieces), _BATCH_SIZE):
            for names, probabilities in _classify(model, tokenizer, pieces[first : first + _BATCH_SIZE], around):
                words = words_of(names, probabilities, skipped)
                texts.append(tokenizer.convert_tokens_to_string(keep_words(words, rate, count_tokens)))
        return "".join(texts)

    return lambda document, _question: compress(document)


def cut_pieces(tokens: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut a document into pieces that the classifier reads one by one.

    A piece ends at its last full stop or newline. If it has none, it has 511 tokens, as in the published code, and the
    classifier reads it without the token that ends it.
    """
    longest, start = _MAX_TOKENS - 2, 0
    while start < len(tokens):
        end = start + longest
        if end < len(tokens):
            end = next((place for place in range(end, start, -1) if tokens[place] in _PIECE_ENDS), end)
        yield tokens[start : end + 1]
        start = end + 1


def words_of(tokens: Sequence[str], probabilities: Sequence[np.float32], skipped: set[str]) -> list[Word]:
    """The words of a piece, with the mark that starts them ("▁").

    A word begins at a token with that mark, or at one of ASCII punctuation. Unknown and other special tokens are no
    part of any word.

    tokens: names of the tokens.
    probabilities: probability of each token that it stays.
    skipped: names of special tokens.
    """
    words: list[tuple[str, list[np.float32]]] = []
    for token, probability in zip(tokens, probabilities, strict=True):
        if token in skipped:
            continue
        if not words or token in string.punctuation or token.startswith(_WORD_START):
            words.append((token, [probability]))
        else:
            text, of_word = words[-1]
            words[-1] = (text + token, [*of_word, probability])
    return [Word(text, np.float32(sum(of_word) / len(of_word))) for text, of_word in words]


def keep_words(words: Sequence[Word], rate: float, count_tokens: CountTokens) -> list[str]:
    """The words of a piece whose probability exceeds the threshold.

    The threshold is a percentile of the words' probabilities, each repeated by its number of tokens. A piece of one
    word therefore keeps nothing.
    """
    counted = [word.probability for word in words for _ in range(count_tokens(word.text))]
    if not counted:
        return []
    threshold = np.percentile(counted, int(100 * (1 - rate) + 1))
    return [text for text, probability in words if probability > threshold or probability == threshold == 1.0]


def cl100k_counter() -> CountTokens:
    """The counter of the published results: the number of `cl100k_base` tokens of a text.

    Nothing is downloaded. Raises ConfigError if tiktoken is not installed, or if its file of this vocabulary is missing
    or damaged.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise ConfigError(
            "LLMLingua-2 counts tokens with the package tiktoken, which is not installed: pip install tiktoken"
        ) from error
    file = cl100k_file()
    fault = None if file.is_file() else "does not exist"
    if fault is None and hashlib.sha256(file.read_bytes()).hexdigest() != _CL100K_SHA256:
        fault = "is damaged"  # tiktoken would delete and download it
    if fault is not None:
        raise ConfigError(
            f"LLMLingua-2 weighs words by their cl100k_base tokens, and {file} {fault}. Download {_CL100K} on a "
            "machine with a network and save it as this file. TIKTOKEN_CACHE_DIR chooses another folder."
        )
    with library_reads("tiktoken", str(file), ConfigError):
        encoding = tiktoken.get_encoding("cl100k_base")
    return lambda text: len(encoding.encode_ordinary(text))


def cl100k_file() -> Path:
    """The file in which tiktoken keeps its vocabulary cl100k_base."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) / hashlib.sha1(_CL100K.encode()).hexdigest()


@lru_cache(maxsize=1)
def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """The classifier and its tokenizer. Systems of one evaluation share them."""
    try:
        from transformers import AutoModelForTokenClassification, AutoTokenizer
    except ImportError as error:
        raise WeightsError(
            'LLMLingua-2 needs the package transformers. Install it with: pip install "arc-ds[transformers]"'
        ) from error
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder}/config.json does not exist; expected the folder of an XLM-RoBERTa for token classification, "
            "such as a copy of microsoft/llmlingua-2-xlm-roberta-large-meetingbank. Check the path."
        )
    with library_reads("transformers", str(folder), WeightsError):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModelForTokenClassification.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if model.config.model_type != "xlm-roberta" or model.config.num_labels != 2 or missing:
        lacking = f", without {', '.join(missing[:4])}" if missing else ""
        raise WeightsError(
            f"{folder} holds a {model.config.model_type} with {model.config.num_labels} classes{lacking}; expected an "
            "xlm-roberta for token classification with 2 classes. Pass the folder of such a model."
        )
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def _classify(
    model: Any, tokenizer: Any, pieces: Sequence[str], around: tuple[int, int]
) -> Iterator[tuple[list[str], list[np.float32]]]:
    """For each piece the names of its tokens, and the probability of each that it stays.

    around: ids of the tokens before and after each piece.
    """
    before, after = around
    ids = [
        [before, *tokenizer.convert_tokens_to_ids(tokenizer.tokenize(piece)), after][:_MAX_TOKENS] for piece in pieces
    ]
    longest = max(map(len, ids))
    padded = torch.tensor([[*line, *[tokenizer.pad_token_id] * (longest - len(line))] for line in ids])
    mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in ids])
    logits = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device)).logits
    probabilities = torch.softmax(logits.float(), dim=-1)[..., 1].cpu().numpy()
    for line, of_line in zip(ids, probabilities, strict=True):
        yield tokenizer.convert_ids_to_tokens(line), list(of_line[: len(line)])


@dataclass(frozen=True, kw_only=True)
class LlmLingua2Section(DecoderSection):
    """Keys of `llmlingua2`."""

    classifier: FilePath
    """Folder of the token classifier, such as a copy of microsoft/llmlingua-2-xlm-roberta-large-meetingbank."""
    rate: Annotated[float, Range(above=0, below=1)]
    """Share of tokens that stay. The paper compares 0.5 and 0.25."""
    ends: Ends = "library"
    """Tokens around each piece that the classifier reads: those of the package llmlingua, or those of the training."""


def build_llmlingua2(section: LlmLingua2Section, settings: SystemSettings) -> TextSystem:
    """A decoder with the words of each document that LLMLingua-2 keeps. Raises like `llmlingua2`."""
    classifier = Path(section.classifier)
    shorten = llmlingua2(
        classifier, rate=section.rate, count_tokens=cl100k_counter(), ends=section.ends, device=settings.device
    )
    description = {
        "kind": "llmlingua2",
        "classifier": classifier.name,
        "classifier_digest": sample_digest(_load(classifier, settings.device)[0]),
        "rate": section.rate,
        "ends": section.ends,
    }
    return text_system(section, settings, section.open(settings), description, shorten=shorten)


LLMLINGUA2_KIND = SystemKind(LlmLingua2Section, build_llmlingua2)
