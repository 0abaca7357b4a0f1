"""Answers of a decoder in this process, in threads of their own.

A free thread takes the oldest waiting answer. A greedy one runs together with other greedy ones that wait; a sampled
one runs alone, so that its seed determines it. Several threads let a short answer pass a long one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from threading import Condition, Thread

import torch

from arc_ds.errors import ArcError
from arc_ds.inference.arc import ArcModel
from arc_ds.inference.prompt import Parts, Vectors
from arc_ds.serving.metrics import Metrics
from arc_ds.serving.protocol import Delta, Finish, Options, RequestError, queue_full
from arc_ds.serving.settings import Settings

logger = logging.getLogger(__name__)

_UNFINISHED = "\ufffd"  # a token may end inside a character


class AnswerText:
    """The text of one answer while its tokens come. `update` after every step; `ended` says whether it is complete.

    decode: text of token ids.
    options: maximum number of tokens, and the texts that end the answer.
    stop_ids: tokens that end the answer.
    emit: called with each piece.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        options: Options,
        stop_ids: frozenset[int],
        emit: Callable[[Delta], None],
    ) -> None:
        self._decode, self._options, self._stop_ids, self._emit = decode, options, stop_ids, emit
        self._sent = ""
        self.num_tokens = 0
        self.ids: list[int] = []
        self.ended = False

    def update(self, ids: list[int]) -> bool:
        """Take the tokens so far. Returns whether the answer has ended."""
        if self.ended:
            return True
        self.ids = ids
        if len(ids) == self.num_tokens or ids[-1] in self._stop_ids:  # the generation ends a line without a token
            return self._end(self._text(ids[: self.num_tokens]), "stop")
        self.num_tokens = len(ids)
        text = self._text(ids)
        place = min((found for stop in self._options.stop if (found := text.find(stop)) >= 0), default=-1)
        if place >= 0:
            return self._end(text[:place], "stop")
        if len(ids) >= self._options.max_tokens:
            return self._end(text, "length")
        self._send(text[: len(text) - self._num_held_back(text)], None)
        return False

    def _text(self, ids: list[int]) -> str:
        text = self._decode(ids)
        return text.removeprefix(" ") if self._options.skip_space else text

    def _num_held_back(self, text: str) -> int:
        """Characters at the end that may still change, or become a stop."""
        whole = text.rstrip(_UNFINISHED)
        begun = (
            n
            for stop in self._options.stop
            for n in range(1, min(len(stop), len(whole) + 1))
            if whole.endswith(stop[:n])
        )
        return len(text) - len(whole) + max(begun, default=0)

    def _end(self, text: str, reason: Finish) -> bool:
        self.ended = True
        self._send(text, reason)
        return True

    def _send(self, text: str, finish: Finish | None) -> None:
        is_longer = len(text) > len(self._sent) and text.startswith(self._sent)
        if is_longer or finish is not None:
            self._emit(Delta(text[len(self._sent) :], self.num_tokens, finish))
            self._sent = text if is_longer else self._sent


class _Job:
    """An answer in the queue, and the way back to the event loop of its request."""

    def __init__(self, parts: Parts, options: Options) -> None:
        self.parts, self.options = parts, options
        self.rows = given_rows(parts) + options.max_tokens
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    @property
    def is_greedy(self) -> bool:
        return self.options.sampling.temperature == 0

    def emit(self, event: Delta | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the server has been stopped by force
            self.is_cancelled = True


class Generation:
    """Threads that answer prompts of one decoder."""

    def __init__(self, model: ArcModel, decoder: int, settings: Settings, metrics: Metrics) -> None:
        self._model, self._decoder = model, decoder
        self._settings, self._metrics = settings, metrics
        tokenizer = model.decoder_tokenizers[decoder]
        assert tokenizer is not None, "the server's start requires one"
        self._tokenizer = tokenizer
        self._queue: deque[_Job] = deque()
        self._changed = Condition()
        self._is_closed = False
        # A decoder of transformers keeps the rows of its one running forward.
        num_threads = settings.threads if model.decoders[decoder].implementation == "native" else 1
        self._threads = [Thread(target=self._run, name=f"generate-{n}", daemon=True) for n in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads. Answers that still run are given up."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    async def answer(self, parts: Parts, options: Options) -> AsyncIterator[Delta]:
        """The answer in pieces; the last one has a reason of its end. Closing the iterator ends the work on it.

        Raises RequestError if too many answers wait.
        """
        job = _Job(parts, options)
        with self._changed:
            if len(self._queue) >= self._settings.waiting:
                raise queue_full("too many requests wait for an answer; try again")
            self._queue.append(job)
            self._metrics.waiting.set(len(self._queue))
            self._changed.notify()
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish is not None:
                    return
        finally:
            job.is_cancelled = True
            with self._changed:
                if job in self._queue:
                    self._queue.remove(job)
                    self._metrics.waiting.set(len(self._queue))

    def _run(self) -> None:
        while batch := self._take():
            self._metrics.batches.labels("generate").observe(len(batch))
            self._answer(batch)

    def _take(self) -> list[_Job]:
        """The next batch, oldest first; none at the end. Waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if self._is_closed:
                return []
            batch = [self._queue.popleft()]
            if batch[0].is_greedy:
                longest = batch[0].rows
                for job in list(self._queue):
                    longest = max(longest, job.rows)
                    is_full = (len(batch) + 1) * longest > self._settings.batch_rows
                    if is_full or len(batch) == self._settings.batch_prompts:
                        break
                    if job.is_greedy:
                        batch.append(job)
                        self._queue.remove(job)
            self._metrics.waiting.set(len(self._queue))
        return batch

    def _answer(self, batch: list[_Job]) -> None:
        texts = [self._text_of(job) for job in batch]

        def has_ended(idx: int, ids: list[int]) -> bool:
            return self._is_closed or batch[idx].is_cancelled or texts[idx].update(ids)

        try:
            ids = self._model.generate_ids(
                [job.parts for job in batch],
                self._decoder,
                max_new_tokens=[job.options.max_tokens for job in batch],
                stop_ids=self._model.decoder_stop_ids[self._decoder],
                sampling=batch[0].options.sampling,
                has_ended=has_ended,
            )
        except Exception as error:
            if len(batch) > 1 and not any(text.num_tokens or text.ended for text in texts):
                for job in batch:  # one of them may be at fault, or they may need too much memory together
                    self._answer([job])
                return
            for job in batch:
                job.emit(as_request_error(error))
        else:
            self._metrics.answer_tokens.inc(sum(map(len, ids)))

    def _text_of(self, job: _Job) -> AnswerText:
        """The text of a job. Stops that are names of special tokens become ids: a tokenizer gives no text for them."""
        special, stops = self._tokenizer.special_ids, job.options.stop
        ids = frozenset(special[stop] for stop in stops if stop in special)
        options = replace(job.options, stop=tuple(stop for stop in stops if stop not in special))

        def emit(delta: Delta) -> None:
            is_last = delta.finish is not None
            job.emit(delta._replace(ids=tuple(text.ids[: text.num_tokens])) if is_last else delta)

        text = AnswerText(self._tokenizer.decode, options, ids, emit)
        return text


def given_rows(parts: Parts) -> int:
    """The decoder's rows of the texts and the given vectors of a prompt."""
    return sum(
        len(part.vectors) if isinstance(part, Vectors) else len(part.ids) if part.kind == "text" else 0
        for part in parts
    )


def as_request_error(error: Exception) -> RequestError:
    """The answer to a request whose work in the model failed."""
    if isinstance(error, ArcError):
        return RequestError(400, str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError(503, "the device has no memory left for this prompt; try again, or shorten it")
    logger.error("the model failed", exc_info=error)
    return RequestError(500, "the server failed to answer; its log has the reason")
