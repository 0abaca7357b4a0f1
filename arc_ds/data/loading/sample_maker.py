"""From picks of the order to samples: read records, tokenise them, and replace those that cannot be used."""

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

# Replacements tried for an unusable record. More failures in a row mean that the whole source is damaged.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The samples of one position: one per decoder, all of the same record.

    samples: one per decoder.
    record_id: (source, record).
    skipped: number of records that could not be used, including in-context examples.
    counts: cuts and changes in the samples of all decoders.
    """

    samples: tuple[Sample, ...]
    record_id: RecordId
    skipped: int
    counts: TaskCounts


class _Reading(NamedTuple):
    """A sample's records, its own first, with tokenizers that know the cached ids of these records.

    idxs: indices of the records in their source.
    records: the records.
    encoder: the encoder's tokenizer.
    decoders: the tokenizers of the step's decoders.
    """

    idxs: Sequence[int]
    records: list[dict[str, Any]]
    encoder: Tokenizer
    decoders: list[Tokenizer]


class _UnusableError(Exception):
    """A record cannot be used, either a sample's own or an in-context example.

    idx: the record.
    reason: the error.
    """

    def __init__(self, idx: int, reason: DataError) -> None:
        super().__init__(idx, reason)
        self.idx = idx
        self.reason = reason


class SampleMaker:
    """Makes the samples of a run. Each process loads the tokenizers at its first sample.

    sources: the mixture.
    encoder_tokenizer: file or folder.
    readers: tokenizer and layout of each decoder.
    on_error: "stop" raises DataError on an unusable record. "skip" replaces a sample's own record by the next one of
        its source, and leaves out an in-context example. Both are counted, and the log names each such record once.
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
        """The samples of some picks for some decoders. Raises DataError on unusable records (see `on_error`).

        Each kind of work is done for all picks before the next kind. Pick by pick it takes a quarter longer, because
        the code is then evicted from the processor's caches.
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
        """The records of a pick. None if one cannot be read."""
        shards = self._sources[pick.source_idx].shards
        try:
            return [shards.record(idx) for idx in _idxs(pick)]
        except DataError:
            return None

    def _made_at_once(self, pick: Pick, reading: _Reading, decoder_idxs: Sequence[int]) -> Made | None:
        """The samples of a pick. None if one of its records cannot be used."""
        try:
            examples = self._make_examples(reading, pick, decoder_idxs)
        except DataError:
            return None
        return _made_of(examples, pick, reading.idxs, skipped=0)

    def _made(self, pick: Pick, decoder_idxs: Sequence[int]) -> Made:
        """The samples of a pick without its unusable record. With "stop", raises the reason."""
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
        """The examples of these records, one per decoder. _UnusableError names the first record that cannot be added
        to those before it."""
        try:
            return self._make_examples(reading, pick, decoder_idxs)
        except DataError as error:
            if len(reading.idxs) > 1:
                fewer = reading._replace(idxs=reading.idxs[:-1], records=reading.records[:-1])
                self._examples(fewer, pick, decoder_idxs)
            name, idx = self._sources[pick.source_idx].shards.name, reading.idxs[-1]
            raise _UnusableError(idx, DataError(f"{name}, record {idx}: {error}")) from error

    def _make_examples(self, reading: _Reading, pick: Pick, decoder_idxs: Sequence[int]) -> list[Example]:
        """One example per decoder. Raises DataError if one cannot be made."""
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
        except ValueError as error:  # an unforeseen text is a fault of the record and must not end the run
            raise DataError(f"it gives no sample: {error}") from error

    def _reading(
        self, pick: Pick, idxs: Sequence[int], records: list[dict[str, Any]], decoder_idxs: Sequence[int]
    ) -> _Reading:
        """Combine records with tokenizers that know their cached ids."""
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
    """The records of a sample without the unusable ones. Empty if the source has no usable record.

    The next free record replaces the sample's own. If there is none, its first example does. Unusable examples are left
    out.
    """
    own, examples = idxs[0], [idx for idx in idxs[1:] if idx not in unusable]
    if own not in unusable:
        return [own, *examples]
    following = ((own + distance) % num_records for distance in range(1, num_records))
    free = next((idx for idx in following if idx not in unusable and idx not in examples), None)
    return examples if free is None else [free, *examples]
