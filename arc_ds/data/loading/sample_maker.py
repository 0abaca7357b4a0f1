"""From picks of the order to samples: read records, tokenise them, and replace those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from arc_ds.batch.segments import Sample
from arc_ds.data.loading.decoder_reader import Reader, ReaderFiles
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import Pick
from arc_ds.data.tasks import NO_COUNTS, TaskCounts, make_example
from arc_ds.errors import DataError
from arc_ds.shards.token_cache.cache import TokenCache, open_token_cache, with_known
from arc_ds.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

OnError = Literal["skip", "stop"]
RecordId = tuple[int, int]
T = TypeVar("T")

# Replacements tried for an unusable record. More failures in a row mean that the whole source is damaged.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionSamples:
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


class _SampleInput(NamedTuple):
    """A sample's records, its own first, with tokenizers that know the cached ids of these records.

    pick: the sample.
    idxs: indices of the records in their source.
    records: the records.
    encoder: the encoder's tokenizer.
    readers: tokenizers and layouts of the step's decoders.
    """

    pick: Pick
    idxs: Sequence[int]
    records: list[dict[str, Any]]
    encoder: Tokenizer
    readers: list[Reader]


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

    def make(self, picks: Sequence[Pick], decoder_idxs: Sequence[int]) -> list[PositionSamples]:
        """The samples of some picks for some decoders. Raises DataError on unusable records (see `on_error`).

        Each kind of work is done for all picks before the next kind. Pick by pick it takes a quarter longer, because
        the code is then evicted from the processor's caches.
        """
        records = [_unless_unusable(self._records, pick, _idxs(pick)) for pick in picks]
        inputs = [
            None if of_pick is None else self._input(pick, _idxs(pick), of_pick, decoder_idxs)
            for pick, of_pick in zip(picks, records, strict=True)
        ]
        made = [None if one is None else _unless_unusable(self._samples, one) for one in inputs]
        return [
            self._samples_of_usable(pick, decoder_idxs) if one is None else one
            for pick, one in zip(picks, made, strict=True)
        ]

    def _records(self, pick: Pick, idxs: Sequence[int]) -> list[dict[str, Any]]:
        """Read records of a pick's source. _UnusableError names the first one that cannot be read."""
        shards, records = self._sources[pick.source_idx].shards, []
        for idx in idxs:
            try:
                records.append(shards.record(idx))
            except DataError as error:
                raise _UnusableError(idx, error) from error
        return records

    def _input(
        self, pick: Pick, idxs: Sequence[int], records: list[dict[str, Any]], decoder_idxs: Sequence[int]
    ) -> _SampleInput:
        """Combine records with tokenizers that know their cached ids."""

        def knowing(tokenizer: Tokenizer) -> Tokenizer:
            return with_known(tokenizer, self._caches[pick.source_idx, tokenizer.fingerprint], idxs, records)

        encoder = knowing(self._encoder)
        readers = [
            Reader(encoder if tokenizer.fingerprint == encoder.fingerprint else knowing(tokenizer), layout)
            for tokenizer, layout in (self._readers[decoder_idx] for decoder_idx in decoder_idxs)
        ]
        return _SampleInput(pick, idxs, records, encoder, readers)

    def _samples(self, given: _SampleInput) -> PositionSamples:
        """One sample per decoder. Raises DataError if one cannot be made."""
        pick = given.pick
        limits = self._sources[pick.source_idx].limits
        try:
            examples = [
                make_example(
                    given.records,
                    task=pick.task,
                    seed=pick.seed,
                    encoder=given.encoder,
                    decoder=reader.tokenizer,
                    limits=limits,
                    layout=reader.layout,
                )
                for reader in given.readers
            ]
        except ValueError as error:  # an unforeseen text is a fault of the record and must not end the run
            raise DataError(f"it gives no sample: {error}") from error
        return PositionSamples(
            samples=tuple([example.sample for example in examples]),
            record_id=(pick.source_idx, given.idxs[0]),
            skipped=0,
            counts=sum([example.counts for example in examples], start=NO_COUNTS),
        )

    def _samples_of_usable(self, pick: Pick, decoder_idxs: Sequence[int]) -> PositionSamples:
        """The samples of a pick without its unusable records. With "stop", raises the reason."""
        source = self._sources[pick.source_idx]
        idxs = _idxs(pick)
        unusable: set[int] = set()
        while idxs and len(unusable) < _MAX_REPLACEMENTS:
            try:
                given = self._input(pick, idxs, self._records(pick, idxs), decoder_idxs)
                return replace(self._samples_or_blame(given), skipped=len(unusable))
            except _UnusableError as error:
                if self._on_error == "stop":
                    raise error.reason from error.reason.__cause__
                if (pick.source_idx, error.idx) not in self._named:
                    self._named.add((pick.source_idx, error.idx))
                    logger.warning("record skipped: %s", error.reason)
                unusable.add(error.idx)
                idxs = _without(idxs, unusable, len(source.shards))
        raise DataError(
            f"{source.shards.name}: {len(unusable)} records in a row from {pick.record_idx} on cannot be used. Run "
            "`arc-ds shards check` on it and build it again."
        )

    def _samples_or_blame(self, given: _SampleInput) -> PositionSamples:
        """As `_samples`, but _UnusableError names the first record that cannot be added to those before it."""
        try:
            return self._samples(given)
        except DataError as error:
            if len(given.idxs) > 1:
                self._samples_or_blame(given._replace(idxs=given.idxs[:-1], records=given.records[:-1]))
            name, idx = self._sources[given.pick.source_idx].shards.name, given.idxs[-1]
            raise _UnusableError(idx, DataError(f"{name}, record {idx}: {error}")) from error


def _idxs(pick: Pick) -> list[int]:
    """The records of a pick, its own first."""
    return [pick.record_idx, *pick.example_idxs]


def _unless_unusable(make: Callable[..., T], *arguments: object) -> T | None:
    """What `make` returns. None if a record cannot be used."""
    try:
        return make(*arguments)
    except (DataError, _UnusableError):
        return None


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
