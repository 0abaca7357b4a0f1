"""Picks of the order to samples: records are read, tokenised, and replaced where they cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from arc_ds.batch.segments import Sample
from arc_ds.data.loading.decoder_reader import Reader, ReaderFiles
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import Pick
from arc_ds.data.tasks import NO_COUNTS, Example, TaskCounts, make_example
from arc_ds.errors import DataError
from arc_ds.shards.token_cache.cache import TokenCache, open_token_cache, with_known
from arc_ds.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

OnError = Literal["skip", "stop"]
RecordId = tuple[int, int]

# Records tried in place of an unusable one: more in a row mean that the source is damaged, not one record.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One position's samples, one for each decoder asked for, all of the same record.

    record_id: (source, record). skipped: records that could not be used, its in-context examples included. counts: of
    all decoders' samples.
    """

    samples: tuple[Sample, ...]
    record_id: RecordId
    skipped: int
    counts: TaskCounts


class _Reading(NamedTuple):
    """A sample's records, its own first, and how they are read: tokenizers with what their caches know of these.

    idxs: of the records in their source. decoders: of those asked for.
    """

    idxs: Sequence[int]
    records: list[dict[str, Any]]
    encoder: Tokenizer
    decoders: list[Tokenizer]


class _UnusableError(Exception):
    """A record, a sample's own or an in-context example, cannot be used; says why."""

    def __init__(self, idx: int, reason: DataError) -> None:
        super().__init__(idx, reason)
        self.idx = idx
        self.reason = reason


class SampleMaker:
    """Makes the samples of a run. Tokenizers are loaded when the first one is made, in each process for itself.

    encoder_tokenizer: file or folder. readers: of each decoder.
    on_error: what an unusable record does: "stop" raises DataError; "skip" goes on without it: a sample's own record
    gives way to the next one of its source, an in-context example is left out. Both are counted, and each such record
    is named once in the log.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        encoder_tokenizer: str | Path,
        readers: Sequence[ReaderFiles],
        on_error: OnError,
    ) -> None:
        self._sources = tuple(sources)
        self._encoder_path = encoder_tokenizer
        self._reader_files = tuple(readers)
        self._on_error = on_error
        self._named: set[RecordId] = set()

    @cached_property
    def _encoder(self) -> Tokenizer:
        return load_tokenizer(self._encoder_path)

    @cached_property
    def _readers(self) -> tuple[Reader, ...]:
        return tuple(files.load() for files in self._reader_files)

    @cached_property
    def _caches(self) -> dict[tuple[int, str], TokenCache | None]:
        """The token caches by source and tokenizer."""
        tokenizers = {
            each.fingerprint: each for each in (self._encoder, *(reader.tokenizer for reader in self._readers))
        }
        return {
            (source_idx, fingerprint): open_token_cache(source.shards, tokenizer)
            for source_idx, source in enumerate(self._sources)
            for fingerprint, tokenizer in tokenizers.items()
        }

    def __getstate__(self) -> dict[str, object]:
        in_each_process = ("_encoder", "_readers", "_caches")
        return {key: value for key, value in self.__dict__.items() if key not in in_each_process}

    def make(self, picks: Sequence[Pick], decoder_idxs: Sequence[int]) -> list[Made]:
        """The samples of picks for some decoders; DataError where a record, or too many in a row, cannot be used.

        Each kind of work is done for all picks before the next kind: in turns they take a quarter longer, since none
        finds its code in the processor's caches.
        """
        records = [self._records(pick) for pick in picks]
        readings = [
            None if of_pick is None else self._reading(pick, _idxs(pick), of_pick, decoder_idxs)
            for pick, of_pick in zip(picks, records, strict=True)
        ]
        made = [
            None if reading is None else self._made_at_once(pick, reading, decoder_idxs)
            for pick, reading in zip(picks, readings, strict=True)
        ]
        return [self._made(pick, decoder_idxs) if one is None else one for pick, one in zip(picks, made, strict=True)]

    def _records(self, pick: Pick) -> list[dict[str, Any]] | None:
        """The records of a pick, None where one cannot be read."""
        shards = self._sources[pick.source_idx].shards
        try:
            return [shards.record(idx) for idx in _idxs(pick)]
        except DataError:
            return None

    def _made_at_once(self, pick: Pick, reading: _Reading, decoder_idxs: Sequence[int]) -> Made | None:
        """The samples of a pick, None where one of its records cannot be used."""
        try:
            examples = self._make_examples(reading, pick, decoder_idxs)
        except DataError:
            return None
        return _made_of(examples, pick, reading.idxs, skipped=0)

    def _made(self, pick: Pick, decoder_idxs: Sequence[int]) -> Made:
        """The samples of a pick of which a record cannot be used: without it, or the error that says why."""
        source = self._sources[pick.source_idx]
        idxs = _idxs(pick)
        unusable: set[int] = set()
        while idxs and len(unusable) < _MAX_REPLACEMENTS:
            try:
                records = [_read(source, idx) for idx in idxs]
                examples = self._examples(self._reading(pick, idxs, records, decoder_idxs), pick, decoder_idxs)
            except _UnusableError as error:
                if self._on_error == "stop":
                    raise error.reason from error.reason.__cause__
                self._name_once((pick.source_idx, error.idx), error.reason)
                unusable.add(error.idx)
                idxs = _without(idxs, unusable, len(source.shards))
                continue
            return _made_of(examples, pick, idxs, skipped=len(unusable))
        raise DataError(
            f"{source.shards.name}: {len(unusable)} records in a row from {pick.record_idx} on cannot be used. Run "
            "`arc-ds shards check` on it and build it again."
        )

    def _examples(self, reading: _Reading, pick: Pick, decoder_idxs: Sequence[int]) -> list[Example]:
        """The examples of these records, one for each decoder; _UnusableError where one record spoils it: the first
        that cannot be added to those in front of it."""
        try:
            return self._make_examples(reading, pick, decoder_idxs)
        except DataError as error:
            if len(reading.idxs) > 1:
                fewer = reading._replace(idxs=reading.idxs[:-1], records=reading.records[:-1])
                self._examples(fewer, pick, decoder_idxs)
            name, idx = self._sources[pick.source_idx].shards.name, reading.idxs[-1]
            raise _UnusableError(idx, DataError(f"{name}, record {idx}: {error}")) from error

    def _make_examples(self, reading: _Reading, pick: Pick, decoder_idxs: Sequence[int]) -> list[Example]:
        """One for each decoder; DataError where one of them cannot be made."""
        limits = self._sources[pick.source_idx].limits
        try:
            return [
                make_example(
                    reading.records,
                    task=pick.task,
                    seed=pick.seed,
                    encoder=reading.encoder,
                    decoder=decoder,
                    limits=limits,
                    layout=self._readers[decoder_idx].layout,
                )
                for decoder_idx, decoder in zip(decoder_idxs, reading.decoders, strict=True)
            ]
        except ValueError as error:  # a text that nobody thought of is the record's fault, not the run's end
            raise DataError(f"it gives no sample: {error}") from error

    def _reading(
        self, pick: Pick, idxs: Sequence[int], records: list[dict[str, Any]], decoder_idxs: Sequence[int]
    ) -> _Reading:
        """Records with their tokenizers."""
        encoder = with_known(self._encoder, self._cache(pick, self._encoder), idxs, records)
        decoders = [
            encoder
            if tokenizer.fingerprint == encoder.fingerprint
            else with_known(tokenizer, self._cache(pick, tokenizer), idxs, records)
            for tokenizer in (self._readers[decoder_idx].tokenizer for decoder_idx in decoder_idxs)
        ]
        return _Reading(idxs, records, encoder, decoders)

    def _cache(self, pick: Pick, tokenizer: Tokenizer) -> TokenCache | None:
        return self._caches[pick.source_idx, tokenizer.fingerprint]

    def _name_once(self, record_id: RecordId, error: DataError) -> None:
        if record_id not in self._named:
            self._named.add(record_id)
            logger.warning("record skipped: %s", error)


def _idxs(pick: Pick) -> list[int]:
    """The records of a pick, its own first."""
    return [pick.record_idx, *pick.example_idxs]


def _made_of(examples: Sequence[Example], pick: Pick, idxs: Sequence[int], *, skipped: int) -> Made:
    return Made(
        samples=tuple([example.sample for example in examples]),
        record_id=(pick.source_idx, idxs[0]),
        skipped=skipped,
        counts=sum([example.counts for example in examples], start=NO_COUNTS),
    )


def _read(source: Source, idx: int) -> dict[str, Any]:
    try:
        return source.shards.record(idx)
    except DataError as error:
        raise _UnusableError(idx, error) from error


def _without(idxs: Sequence[int], unusable: Set[int], num_records: int) -> list[int]:
    """The records of a sample without the unusable ones; none where all of the source's are.

    Its own gives way to the next one that is free, or where none is to its first example; an example is left out.
    """
    own, examples = idxs[0], [idx for idx in idxs[1:] if idx not in unusable]
    if own not in unusable:
        return [own, *examples]
    following = ((own + distance) % num_records for distance in range(1, num_records))
    free = next((idx for idx in following if idx not in unusable and idx not in examples), None)
    return examples if free is None else [free, *examples]
