"""A frozen decoder with what belongs to it: tokenizer, stops, limits. It needs no compressor.

reader = DecoderReader.open("models/llama")
lines = reader.generate(["The capital of France is"], stop=["\\n"])
reader.nll(["The capital of France is"], [" Paris"])
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arc_ds.batch.segments import Segment, TokenIds
from arc_ds.data.tasks.chat import LayoutName
from arc_ds.errors import ConfigError, DataError, TokenizerError
from arc_ds.inference.decoder_files import find_max_positions, find_stop_ids
from arc_ds.inference.decoders import Implementation, OpenedDecoder, open_decoder
from arc_ds.inference.generate import (
    MAX_NEW_TOKENS,
    Chooser,
    Continuation,
    Sampling,
    StopReason,
    continue_batch,
    whole_number,
)
from arc_ds.inference.load import DecoderSettings, load_decoder_tokenizer
from arc_ds.inference.prompt import Context, Parts, Prompt, Vectors
from arc_ds.inference.rows import (
    MAX_ROWS,
    Rows,
    joined,
    num_common,
    num_common_rows,
    num_rows,
    pack_rows,
    row_batches,
    rows_after,
    rows_before,
)
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.kv_cache import SharedRows
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.system.device import usable_device, usable_memory_bytes
from arc_ds.system.user_files import check_encodable
from arc_ds.tokenizers import Tokenizer, read_together

logger = logging.getLogger(__name__)

# A common prefix is read apart if this saves so many rows; for fewer the additional forward costs more.
_MIN_SAVED_ROWS = 32


class Nll(NamedTuple):
    """NLL of a text in nats, summed over its tokens, and their number."""

    nats: float
    tokens: int


class Answer(NamedTuple):
    """The continuation of a prompt.

    text: the new text before the first stop text.
    raw: all new text.
    ids: all new tokens.
    stop: why it ends: at a stop text, at an end of the decoder's texts, or at the limit of new tokens.
    """

    text: str
    raw: str
    ids: list[int]
    stop: StopReason


class _KeptRows(NamedTuple):
    """Shared rows of an earlier call, and what the decoder has read of them."""

    rows: Rows
    shared: SharedRows

    def fits(self, prompt: Rows, max_len: int | None) -> bool:
        """Whether a prompt begins with the rows, in sequences of this length."""
        return self.shared.max_len in (None, max_len) and num_common(prompt, self.rows) == self.shared.num_rows


class _RowBatch(NamedTuple):
    """Prompts that are read at once.

    indices: of the prompts.
    rows: rows of each prompt, without the shared ones.
    """

    indices: range
    rows: list[Rows]


@dataclass(kw_only=True)
class DecoderReader:
    """A frozen decoder and what belongs to it.

    decoder: the decoder.
    tokenizer: None if prompts come as token ids.
    bos: whether text prompts begin with its begin-of-text token, if its tokenizer has one.
    chat_template: the layout of its chats in training (`read_layout`), if it is known.
    stop_ids: ids that end a text. The default is the end-of-text token of its tokenizer.
    max_positions: the longest sequence that its files state, if any. A longer one gives a warning.
    is_whole: False if only its embedding table was loaded.
    name: its name in messages.
    """

    decoder: FrozenDecoder
    tokenizer: Tokenizer | None = None
    bos: bool = True
    chat_template: LayoutName | None = None
    stop_ids: tuple[int, ...] | None = None
    max_positions: int | None = None
    is_whole: bool = True
    name: str = "the decoder"

    def __post_init__(self) -> None:
        if self.stop_ids is None:
            end = None if self.tokenizer is None else self.tokenizer.eos_id
            self.stop_ids = () if end is None else (end,)
        self._named_length = 0  # the longest that a warning has named
        self._kept: _KeptRows | None = None

    @staticmethod
    def open(
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        bos: bool = True,
        rope_scaling: RopeScalingChoice = "checkpoint",
        implementation: Implementation = "auto",
        trust_remote_code: bool = False,
    ) -> DecoderReader:
        """Load a decoder from a weights folder or a .gguf file, with the tokenizer there.

        bos, rope_scaling, implementation: as in a run's `decoders`.
        trust_remote_code: whether transformers may run Python files of the folder.

        Raises WeightsError and TokenizerError if files are missing or damaged, and ConfigError if the device is not
        available.
        """
        device, path = usable_device(device), Path(path)
        opened = open_decoder(path, rope_scaling, implementation=implementation, trust_remote_code=trust_remote_code)
        settings = DecoderSettings(rope_scaling=rope_scaling, bos=bos)
        return reader_of(path, opened, settings)(decoder=opened.load(device, dtype))

    @property
    def device(self) -> torch.device:
        """The device of the decoder."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder."""
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        return next(parameter for parameter in self.decoder.parameters() if not parameter.is_meta)

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError if there is none."""
        if self.tokenizer is None:
            raise TokenizerError(f"{self.name} was loaded without a tokenizer: add one to the decoder's folder")
        return self.tokenizer

    def read(
        self,
        prompt: Prompt | Parts,
        where: str = "a prompt",
        *,
        answer: str | None = None,
        compressible: Callable[[Context], Segment] | None = None,
        texts_apart: bool = False,
    ) -> tuple[list[Segment | Vectors], TokenIds]:
        """The parts of a prompt with the begin-of-text token, and the tokens of an answer after it.

        A prompt of `Segment`, and `Vectors` between them, is returned as given. An answer is tokenised together with
        the text before it.

        where: the prompt, for errors.
        answer: a text after the prompt; None: no text.
        compressible: makes the segment of a `Context`; None if there is no compressor.
        texts_apart: see `ArcModel`.

        Raises TokenizerError if a text needs a tokenizer, and DataError on a prompt of another kind.
        """
        if not isinstance(prompt, str | Context | Vectors | Sequence):
            raise DataError(f"{where} is a {type(prompt).__name__}; expected a str, a Context, or a list of them")
        parts = [prompt] if isinstance(prompt, str | Context | Vectors) else list(prompt)
        given = [part for part in parts if isinstance(part, Segment | Vectors)]
        is_given = len(given) == len(parts) and any(isinstance(part, Segment) for part in parts)
        if is_given and answer is None:
            return given, Segment.text([]).ids
        tokenizer = self.needed_tokenizer()
        if is_given:
            return given, self._tokens([answer or ""], where, inside=not texts_apart)[0]
        read: list[Segment | Vectors] = []
        if self.bos and tokenizer.bos_id is not None:
            read.append(Segment.text([tokenizer.bos_id]))
        texts = _join_texts(parts)
        if answer is not None and not (texts and isinstance(texts[-1], str)):
            texts.append("")
        answer_ids, is_inside = Segment.text([]).ids, False
        for place, part in enumerate(texts):
            if isinstance(part, str):
                with_answer = [part] if answer is None or place + 1 < len(texts) else [part, answer]
                ids, *after = self._tokens(with_answer, where, inside=is_inside and not texts_apart)
                read.append(Segment.text(ids))
                answer_ids = after[0] if after else answer_ids
            elif isinstance(part, Context) and compressible is not None:
                read.append(compressible(part))
            elif isinstance(part, Vectors):
                read.append(self._checked(part, where))
            else:
                kinds = "str and Context, or of Segment only" if compressible else "str and Vectors"
                raise DataError(f"a prompt consists of {kinds}; got a {type(part).__name__}")
            is_inside = not isinstance(part, str)
        return read, answer_ids

    def _tokens(self, texts: Sequence[str], where: str, *, inside: bool) -> list[TokenIds]:
        checked = [check_encodable(text, where) for text in texts]
        return [TokenIds(ids) for ids in read_together(self.needed_tokenizer(), checked, inside=inside)]

    def _checked(self, part: Vectors, where: str) -> Vectors:
        width = self.decoder.hidden_size
        if part.vectors.dim() != 2 or part.vectors.shape[1] != width or not len(part.vectors):
            raise DataError(
                f"vectors of {where} have shape {list(part.vectors.shape)}; {self.name} reads [m, {width}] with m of "
                "at least 1. Pass what `compress` gives for this decoder."
            )
        return part

    def rows(self, parts: Parts, index: int) -> list[TokenIds | Tensor]:
        """The rows of a prompt's parts, of which none is a context.

        index: of the prompt, for errors.

        Raises DataError on a prompt without rows, ids outside the vocabulary or vectors of another width.
        """
        where = f"prompt {index}"
        found = joined([p.ids if isinstance(p, Segment) else self._checked(p, where).vectors for p in parts])
        if not found:
            raise DataError(f"sequence {index} is empty: it needs at least one text token or context")
        for part in found:
            if isinstance(part, TokenIds):
                check_ids("decoder", part, self.decoder.vocab_size)
        device, dtype = self.device, self.dtype  # stored vectors may be on the CPU, in another dtype
        return [part.to(device, dtype) if isinstance(part, Tensor) else part for part in found]

    def generate(
        self,
        prompts: Sequence[Prompt | Parts],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        max_rows: int | None = None,
    ) -> list[Answer]:
        """Continue prompts of texts and `Vectors`, and end at every stop. See `ArcModel.generate`.

        max_new_tokens: limit, or one for each prompt.
        max_rows: see `continue_rows`.
        """
        check_is_list("prompts", prompts)
        parts = [self.read(prompt, f"prompt {idx}")[0] for idx, prompt in enumerate(prompts)]
        rows = [self.rows(part, idx) for idx, part in enumerate(parts)]
        return self.answer_rows(
            rows, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, stop_ids=stop_ids, max_rows=max_rows
        )

    def answer_rows(
        self,
        prompts: Sequence[Rows],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        max_rows: int | None = None,
        max_shared: int | None = None,
    ) -> list[Answer]:
        """Continue prompts that are rows already, and end at every stop.

        stop: texts that end a continuation, or names of special tokens.
        stop_ids: ids that end a continuation besides those of the decoder's files.
        max_rows, max_shared: see `continue_rows`.
        """
        tokenizer = self.needed_tokenizer()
        texts, ends = self._ends(stop, stop_ids)
        # A token has at least one byte. Sentencepiece drops a space with which the window begins.
        window = max((len(text.encode()) for text in texts), default=0) + 4

        def has_stopped(_idx: int, line: list[int]) -> bool:
            recent = tokenizer.decode(line[-window:])
            return any(text in recent for text in texts)

        lines = self.continue_rows(
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=ends,
            sampling=sampling,
            has_ended=has_stopped if texts else None,
            max_rows=max_rows,
            max_shared=max_shared,
        )
        raws = [tokenizer.decode(line.ids) for line in lines]
        return [
            Answer(before_first(raw, texts), raw, line.ids, line.stop) for raw, line in zip(raws, lines, strict=True)
        ]

    def _ends(self, stop: Sequence[str], stop_ids: Sequence[int] = ()) -> tuple[list[str], list[int]]:
        """(texts that end a continuation, ids that do), with those of the decoder's files.

        stop, stop_ids: see `answer_rows`.
        """
        special, stops = self.needed_tokenizer().special_ids, _stop_texts(stop)
        named = [special[text] for text in stops if text in special]
        vocabulary = range(self.decoder.vocab_size)  # a tokenizer may name more tokens than the decoder has
        ids = [idx for idx in (*(self.stop_ids or ()), *named) if idx in vocabulary]
        return [text for text in stops if text not in special], [*ids, *self.checked_stop_ids(stop_ids)]

    @torch.no_grad()
    def continue_rows(
        self,
        prompts: Sequence[Rows],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        has_ended: Callable[[int, list[int]], bool] | None = None,
        max_rows: int | None = None,
        max_shared: int | None = None,
    ) -> list[Continuation]:
        """Continue each prompt with new tokens. No stops but `stop_ids` and `has_ended`.

        Rows with which all prompts begin are read once. A sequence leaves its batch when it ends.

        prompts: results of `rows`.
        max_new_tokens: limit, or one for each prompt.
        has_ended: called after every step with (index of a prompt, its new tokens) if it had not ended before; True
            ends it.
        max_rows: largest batch: sequences times the rows of the longest one with its new tokens, without shared rows.
            None: half of the memory for keys and values, and at most 16384 rows.
        max_shared: most rows that are read once. With it, their number depends on the prompts alone. None: as many as
            are worth it, which also depends on the rows that the last call left.

        Raises ConfigError on an invalid number, or if a sequence does not fit into memory.
        """
        self.check_whole()
        limits = self._limits(max_new_tokens, len(prompts))
        if not prompts:
            return []
        max_len = max(map(num_rows, prompts)) + max(limits)
        self.warn_of_length(max_len - max(limits), max(limits))
        shared, num_shared = self._read_shared(prompts, max_len, max_shared)
        lengths = [num_rows(prompt) - num_shared + max(limits) for prompt in prompts]
        choose = Chooser(sampling or Sampling(), self.device)
        found: list[Continuation] = []
        for indices, rows in self._batches(prompts, num_shared, lengths, max_rows):
            batch, z_ZD = pack_rows(rows, self.device, self.dtype)
            found += continue_batch(
                self.decoder,
                batch,
                z_ZD,
                max_new_tokens=limits[indices.start : indices.stop],
                choose=choose,
                stop_ids=stop_ids,
                has_ended=None if has_ended is None else partial(_at, has_ended, indices.start),
                shared=shared,
                max_len=max_len,
            )
        return found

    @torch.no_grad()
    def nll_rows(
        self,
        prompts: Sequence[Rows],
        answers: Sequence[TokenIds],
        max_rows: int | None = None,
        max_shared: int | None = None,
    ) -> list[Nll]:
        """NLL of each answer after its prompt. Logits are made at the rows that predict an answer only.

        prompts: results of `rows`.
        answers: tokens of each answer. An answer without tokens has the NLL 0 of 0 tokens.
        max_rows, max_shared: see `continue_rows`.
        """
        self.check_whole()
        for answer in answers:
            check_ids("decoder", answer, self.decoder.vocab_size)
        whole = [joined([*prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        if not whole:
            return []
        self.warn_of_length(max(map(num_rows, whole)), 0)
        shared, num_shared = self._read_shared(prompts, None, max_shared)
        lengths = [num_rows(rows) - num_shared for rows in whole]
        found: list[Nll] = []
        for indices, rows in self._batches(whole, num_shared, lengths, max_rows):
            batch, z_ZD = pack_rows(rows, self.device, self.dtype)
            asked = [answers[idx] for idx in indices]
            ends = np.cumsum([lengths[idx] for idx in indices])
            sizes = [len(answer) for answer in asked]
            places = [np.arange(end - size - 1, end - 1) for end, size in zip(ends.tolist(), sizes, strict=True)]
            sequences = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(self.device)
            labels = np.concatenate([np.asarray(answer, dtype=np.int64) for answer in asked])
            batch = dataclasses.replace(
                batch,
                label_rows=torch.from_numpy(np.concatenate(places)).to(self.device),
                labels=torch.from_numpy(labels).to(self.device),
                label_sequences=sequences,
            )
            nats_B = torch.zeros(len(sizes), dtype=torch.float64, device=self.device)
            if len(labels):
                nats_B.index_add_(0, sequences, self.decoder.label_nll(batch, z_ZD, shared).double())
            found += map(Nll, nats_B.tolist(), sizes)
        return found

    def nll(
        self, prompts: Sequence[Prompt | Parts], answers: Sequence[str], *, max_rows: int | None = None
    ) -> list[Nll]:
        """NLL of each answer after its prompt of texts and `Vectors`. See `ArcModel.nll`."""
        check_is_list("prompts", prompts)
        check_same_number(prompts, answers)
        read = [self.read(p, f"prompt {i}", answer=a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
        rows = [self.rows(parts, idx) for idx, (parts, _) in enumerate(read)]
        return self.nll_rows(rows, [ids for _, ids in read], max_rows)

    def _read_shared(
        self, prompts: Sequence[Rows], max_len: int | None, most: int | None = None
    ) -> tuple[SharedRows | None, int]:
        """(the rows with which all prompts begin, their number) if reading them apart saves enough; else (None, 0).

        Those of the last call are kept: the batches of an evaluation begin with the same examples.

        most: see `continue_rows`.
        """
        kept, count = self._kept, num_common_rows(prompts)
        num_kept = 0 if kept is None else kept.shared.num_rows
        if most is None:
            # Reading new shared rows costs `count` rows; with the kept ones each prompt reads those that they lack.
            is_useful = num_kept <= count and len(prompts) * (count - num_kept) <= count
            num_saved = count * (len(prompts) - 1)
        else:
            count = num_saved = min(count, most)
            is_useful = num_kept == count
        if kept is not None and is_useful and kept.fits(prompts[0], max_len):
            return kept.shared, num_kept
        if num_saved < _MIN_SAVED_ROWS:
            return None, 0
        # A copy: the caller may write to its vectors before the next call.
        rows = [part.clone() if isinstance(part, Tensor) else part for part in rows_before(prompts[0], count)]
        batch, z_ZD = pack_rows([rows], self.device, self.dtype)
        self._kept = kept = None  # frees the memory before the new rows are read
        shared = self.decoder.read_shared(batch, z_ZD, max_len)
        if shared is None:
            return None, 0
        self._kept = _KeptRows(rows, shared)
        return shared, count

    def forget(self) -> None:
        """Drop the shared rows of the last call, which take memory."""
        self._kept = None

    def _batches(
        self, prompts: Sequence[Rows], num_shared: int, lengths: Sequence[int], max_rows: int | None
    ) -> Iterable[_RowBatch]:
        if max_rows is None:
            row_bytes = max(self.decoder.cache_row_bytes, 1)
            max_rows = min(MAX_ROWS, usable_memory_bytes(self.device) // 2 // row_bytes)
        else:
            max_rows = whole_number("max_rows", max_rows, at_least=1, at_most=2**31 - 1)
        for indices in row_batches(lengths, max_rows):
            yield _RowBatch(indices, [rows_after(prompts[idx], num_shared) for idx in indices])

    def _limits(self, max_new_tokens: int | Sequence[int], num_prompts: int) -> list[int]:
        if not isinstance(max_new_tokens, list | tuple):
            limit = whole_number("max_new_tokens", max_new_tokens, at_least=0, at_most=MAX_NEW_TOKENS)
            return [limit] * num_prompts
        if len(max_new_tokens) != num_prompts:
            raise ConfigError(
                f"max_new_tokens has {len(max_new_tokens)} limits for {num_prompts} prompts. Give one for each, or one "
                "number."
            )
        return [whole_number("max_new_tokens", n, at_least=0, at_most=MAX_NEW_TOKENS) for n in max_new_tokens]

    def checked_stop_ids(self, stop_ids: Sequence[int]) -> list[int]:
        """The ids. Raises ConfigError if they are no list of ids of the vocabulary."""
        last = self.decoder.vocab_size - 1
        if not isinstance(stop_ids, Iterable):
            raise ConfigError(f"stop_ids is {stop_ids!r}; expected a list of token ids, such as [2]")
        return [whole_number("a stop id", idx, at_least=0, at_most=last) for idx in stop_ids]

    def check_whole(self) -> None:
        """Raise ConfigError if only the embedding table was loaded."""
        if not self.is_whole:
            raise ConfigError(
                "only the decoder's embedding table was loaded, so it cannot read a prompt. Load the model with "
                'decoder_parts="all", or give `prompt_embeds` to another engine.'
            )

    def warn_of_length(self, num_rows: int, max_new_tokens: int) -> None:
        """Warn of a sequence beyond the decoder's positions, if no warning has named such a length before."""
        limit, length = self.max_positions, num_rows + max_new_tokens
        if limit is None or length <= max(limit, self._named_length):
            return
        self._named_length = length
        logger.warning(
            f"a sequence has {num_rows:,} tokens and vectors, and up to {max_new_tokens:,} new tokens; {self.name} "
            f"was trained on at most {limit:,} positions. Its text may degrade beyond them. Shorten the prompt, "
            "compress more of it, or lower max_new_tokens."
        )


def reader_of(
    path: Path, opened: OpenedDecoder, settings: DecoderSettings, *, force: bool = False, **options: Any
) -> partial[DecoderReader]:
    """Read the small files of a decoder. The result makes the reader from the loaded decoder (`decoder=`).

    path: the decoder's folder or .gguf file.
    settings: of the decoder in training.
    force: whether it may have another tokenizer than in training.
    options: further fields of the reader.
    """
    tokenizer = load_decoder_tokenizer(path, opened, settings, force=force)
    return partial(
        DecoderReader,
        tokenizer=tokenizer,
        bos=settings.bos,
        chat_template=settings.chat_template,
        stop_ids=tuple(idx for idx in find_stop_ids(path, tokenizer) if idx < opened.sizes.vocab_size),
        max_positions=find_max_positions(path),
        **options,
    )


def check_ids(what: str, ids: TokenIds | Tensor, vocab_size: int) -> None:
    """Raise DataError if ids are outside a vocabulary."""
    values = ids.array if isinstance(ids, TokenIds) else ids
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < vocab_size:
        raise DataError(
            f"token ids {int(values.min())} to {int(values.max())} for the {what}; expected 0 to {vocab_size - 1}: use "
            f"ids of the {what}'s own tokenizer"
        )


def check_is_list(what: str, given: object) -> None:
    """Raise DataError on a single text, which would be read as a list of its characters or bytes."""
    single = str | bytes | bytearray | Context | Vectors | Segment
    if isinstance(given, single) or not isinstance(given, Iterable):
        raise DataError(f"{what} is one {type(given).__name__}; expected a list: write [{what.removesuffix('s')}]")


def check_same_number(prompts: Sequence[Any], answers: Sequence[Any]) -> None:
    """Raise DataError unless there is an answer for each prompt."""
    check_is_list("answers", answers)
    if len(prompts) != len(answers):
        raise DataError(
            f"{len(prompts)} prompts and {len(answers)} answers were given; give one answer for each prompt"
        )


def _at(has_ended: Callable[[int, list[int]], bool], first: int, idx: int, ids: list[int]) -> bool:
    """`has_ended` for a batch whose first prompt has another index."""
    return has_ended(first + idx, ids)


def _join_texts(parts: Sequence[object]) -> list[object]:
    """Join adjacent texts, because splitting a text must not change its tokens."""
    found: list[object] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        members = list(group)
        found += ["".join(map(str, members))] if is_text else members
    return found


def _stop_texts(stop: Sequence[str]) -> list[str]:
    """The texts themselves. ConfigError if they are not a list of texts of at least one character each."""
    is_list = isinstance(stop, Iterable) and not isinstance(stop, str)
    texts = list(stop) if is_list else []
    if not is_list or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop is {stop!r}; expected a list of texts that are not empty, such as ['\\n\\n']")
    return [check_encodable(text, "a stop") for text in texts]


def before_first(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops in it; all of it if there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
