"""From the body of a request to its answer: prompts, limits, vectors, and the decoder here or upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from typing import Any, NamedTuple

from safetensors.torch import save

from arc_ds.batch.segments import Marker, Segment, TokenIds
from arc_ds.data.tasks.chat import Layout
from arc_ds.errors import ArcError, DataError
from arc_ds.inference.arc import ArcModel, Context, Vectors
from arc_ds.inference.load import check_runs_elsewhere
from arc_ds.inference.prompt import Parts, with_vectors
from arc_ds.inference.prompt_embeds import decode_tensor
from arc_ds.inference.reader import check_ids
from arc_ds.serving import prompts
from arc_ds.serving.compressions import Compressions
from arc_ds.serving.generation import Generation, given_rows
from arc_ds.serving.metrics import Metrics
from arc_ds.serving.protocol import (
    ChatBody,
    CompletionBody,
    CompressBody,
    Delta,
    Kind,
    Options,
    RequestError,
    Usage,
    parse_json,
    read_body,
    read_options,
)
from arc_ds.serving.settings import Settings, UpstreamSettings
from arc_ds.serving.upstream import Question, Upstream
from arc_ds.system.user_files import check_encodable

_CHARACTERS = 32  # no text has more characters per token; most have 4


class GenerationRequest(NamedTuple):
    """A request for an answer, checked and tokenised.

    question: the prompt.
    contexts: its contexts, in reading order.
    options: how to answer.
    is_stream: whether the answer comes as a stream.
    with_usage: whether the stream ends with the counts.
    with_ids: whether the answer names its tokens.
    """

    question: Question
    contexts: tuple[Segment, ...]
    options: Options
    is_stream: bool
    with_usage: bool
    with_ids: bool = False


class Reply(NamedTuple):
    """An answer in pieces, the counts of its prompt, and why it was made from text, if it was."""

    deltas: AsyncIterator[Delta]
    usage: Usage
    fallback: str | None = None


class Service:
    """The server without HTTP. Use it as an asynchronous context manager in the event loop.

    model: the compressor, and the decoder or its embedding table, if any.
    decoder: index of the decoder.
    layout: the decoder's chat template; the plain layout for base decoders.
    marker: marker after each context.
    upstream: the server that runs the decoder; None if `model` runs it.

    Raises ConfigError if the decoder has adapters, which an upstream does not know.
    """

    def __init__(
        self,
        model: ArcModel,
        decoder: int,
        layout: Layout,
        marker: Marker | None,
        settings: Settings,
        upstream: UpstreamSettings | None = None,
    ) -> None:
        if upstream is not None:
            check_runs_elsewhere(model.spec, decoder)
        self.settings, self.metrics = settings, Metrics()
        self._model, self._decoder, self._layout, self._marker = model, decoder, layout, marker
        self._upstream_settings = upstream
        self._has_decoder = decoder < len(model.decoders)
        self._open = AsyncExitStack()
        self._compressions = Compressions(model, decoder, settings, self.metrics)

    async def __aenter__(self) -> Service:
        await self._open.enter_async_context(self._compressions)
        self._generation: Generation | None = None
        self._upstream: Upstream | None = None
        if self._upstream_settings is None:
            generation = Generation(self._model, self._decoder, self.settings, self.metrics)
            self._generation = self._open.enter_context(closing(generation))
        else:
            upstream = Upstream(self._upstream_settings, self._model, self._decoder, self.metrics)
            self._upstream = await self._open.enter_async_context(upstream)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    @property
    def max_rows(self) -> int:
        """Longest prompt plus answer, in rows of the decoder."""
        stated = self._model.readers[self._decoder].max_positions if self._has_decoder else None
        return min(self.settings.prompt_rows, stated or self.settings.prompt_rows)

    def read(self, kind: Kind, raw: bytes) -> GenerationRequest:
        """Check and tokenise the body of a request. Takes time, so it runs in a thread. Raises RequestError."""
        plain = parse_json(raw)
        try:
            return self._read_chat(plain) if kind == "chat" else self._read_completion(plain)
        except ArcError as error:
            raise RequestError(400, str(error)) from error

    def _read_chat(self, plain: dict[str, Any]) -> GenerationRequest:
        body = read_body(ChatBody, plain, self.settings)
        is_plain = not self._layout.is_chat
        # A blank line ends an answer in training; without the decoder's files, the upstream's template decides.
        stops = (prompts.BLANK_LINE,) if is_plain and self._has_decoder else ()
        options = read_options(body, self.settings, stops)
        chat = prompts.read_chat(body, self._marker)
        documents = [context for turn in chat.turns for context in turn.documents]
        said = [text for turn in chat.turns for text in (turn.words, turn.answer or "")]
        self._check_size(documents, chat.system, *said)
        if not self._has_decoder:
            return self._request(body, Question(None, chat), options, self._contexts(documents))
        has_lead = is_plain or bool(chat.turns[-1].documents)
        if is_plain:
            segments = self._model.segments(list(prompts.write_plain(chat)), self._decoder)
        else:
            encoder, decoder = self._model.encoder_tokenizer, self._model.decoder_tokenizers[self._decoder]
            assert encoder is not None and decoder is not None, "the server's start requires both"
            segments = prompts.chat_segments(chat, self._layout, encoder, decoder)
        return self._request(body, Question(segments, chat), replace(options, skip_space=has_lead))

    def _read_completion(self, plain: dict[str, Any]) -> GenerationRequest:
        body = read_body(CompletionBody, plain, self.settings)
        options = read_options(body, self.settings)
        if (body.prompt is None) == (body.prompt_embeds is None):
            raise RequestError(400, "give either `prompt` or `prompt_embeds`", param="prompt")
        if body.prompt_embeds is not None or isinstance(body.prompt, list):
            return self._request(body, Question(self._given_parts(body), text=body.prompt), options)
        parts = prompts.read_completion(body, self._marker)
        documents = [part for part in parts if isinstance(part, Context)]
        self._check_size(documents, body.prompt)
        if documents and not self._has_decoder:
            raise RequestError(
                400,
                "this server has no files of the decoder, so it cannot embed the text around the documents of a "
                "completion. Use /v1/chat/completions, or start the server with --decoder FOLDER.",
                param="documents",
            )
        segments = self._model.segments(list(parts), self._decoder) if self._has_decoder else None
        return self._request(body, Question(segments, text=prompts.as_text(parts)), options)

    def _given_parts(self, body: CompletionBody) -> Parts:
        """A prompt of token ids, or of rows, which the decoder reads as they are."""
        if body.documents:
            raise RequestError(400, "`documents` need a prompt that is a text", param="documents")
        if not self._has_decoder:
            raise RequestError(400, "this server has no files of the decoder, so it takes texts only", param="prompt")
        decoder = self._model.decoders[self._decoder]
        if body.prompt_embeds is None:
            check_ids("decoder", TokenIds(body.prompt), decoder.vocab_size)
            return [Segment.text(body.prompt)]
        if not self.settings.prompt_embeds:
            raise RequestError(
                400,
                "this server takes no `prompt_embeds`: start it with --prompt-embeds",
                param="prompt_embeds",
                code="unsupported_parameter",
            )
        try:
            rows_RD = decode_tensor(body.prompt_embeds, decoder.hidden_size)
        except DataError as error:
            raise RequestError(400, f"`prompt_embeds`: {error}", param="prompt_embeds") from error
        # The empty segment says that these are parts as the decoder reads them, without a begin-of-text token.
        return [Segment.text([]), Vectors(rows_RD)]

    def _request(
        self,
        body: ChatBody | CompletionBody,
        question: Question,
        options: Options,
        contexts: Sequence[Segment] = (),
    ) -> GenerationRequest:
        """`contexts`: of a question without segments."""
        if question.segments is not None:
            contexts = [part for part in question.segments if isinstance(part, Segment) and part.kind == "context"]
        self._check_contexts(contexts)
        if question.segments is not None and not contexts and not given_rows(question.segments):
            raise RequestError(400, "the prompt is empty: give it text or documents", param="prompt")
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        with_ids = isinstance(body, CompletionBody) and bool(body.return_token_ids)
        return GenerationRequest(question, tuple(contexts), options, bool(body.stream), usage, with_ids)

    def read_documents(self, raw: bytes) -> tuple[Segment, ...]:
        """The contexts of a body of `/v1/compress`. Raises RequestError."""
        try:
            body = read_body(CompressBody, parse_json(raw), self.settings)
            documents = [Context(document.text, self._marker) for document in body.documents]
            self._check_size(documents)
            contexts = self._contexts(documents)
        except ArcError as error:
            raise RequestError(400, str(error)) from error
        self._check_contexts(contexts)
        return tuple(contexts)

    async def compress(self, contexts: Sequence[Segment]) -> bytes:
        """The vectors of each context as safetensors: context_0, context_1, …"""
        found = await self._compressions.vectors(contexts)
        tensors = {f"context_{idx}": one.vectors.detach().cpu() for idx, one in enumerate(found)}
        # Equal documents share a tensor, which safetensors refuses.
        return await asyncio.to_thread(save, {name: tensor.clone() for name, tensor in tensors.items()})

    async def reply(self, request: GenerationRequest) -> Reply:
        """Compress the documents and start the answer. Raises RequestError."""
        found = await self._compressions.vectors(request.contexts)
        vectors = [one.vectors for one in found]
        compressed_rows = sum(map(len, vectors))
        usage = Usage(
            prompt_tokens=compressed_rows + given_rows(request.question.segments or ()),
            completion_tokens=0,
            encoder_tokens=sum(len(context.ids) for context in request.contexts),
            compressed_rows=compressed_rows,
            cached_documents=sum(one.is_cached for one in found),
        )
        options = self._fitting(request.options, usage.prompt_tokens)
        if self._upstream is not None:
            deltas, fallback = await self._upstream.answer(request.question, vectors, options)
            return Reply(deltas, usage, fallback)
        assert self._generation is not None and request.question.segments is not None
        parts = with_vectors(request.question.segments, vectors)
        return Reply(self._generation.answer(parts, options), usage)

    def _contexts(self, documents: Sequence[Context]) -> list[Segment]:
        encoder = self._model.encoder_tokenizer
        assert encoder is not None, "the server's start requires one"
        lines = encoder.encode_batch([check_encodable(document.text, "a document") for document in documents])
        if not all(map(len, lines)):
            raise RequestError(400, "a document gives no token: leave it out or give it text", param="documents")
        return [Segment.context(TokenIds(ids), document.marker) for ids, document in zip(lines, documents, strict=True)]

    def _check_size(self, documents: Sequence[Context], *texts: str) -> None:
        """Raise RequestError before anything is tokenised if it is surely too much."""
        if len(documents) > self.settings.documents:
            raise RequestError(
                400,
                f"the request has {len(documents)} documents; this server takes at most {self.settings.documents}",
                param="documents",
                code="too_many_documents",
            )
        for text in texts:
            check_encodable(text, "the prompt")
        limits, sizes = self.settings, [len(document.text) for document in documents]
        for what, size, max_tokens in (
            ("a document has", max(sizes, default=0), limits.document_tokens),
            ("the documents have", sum(sizes), limits.request_tokens),
            ("the prompt has", sum(map(len, texts)), limits.prompt_rows),
        ):
            if size > _CHARACTERS * max_tokens:
                raise RequestError(
                    400,
                    f"{what} {size} characters: more than {max_tokens} tokens, the limit of this server",
                    code="too_many_tokens",
                )

    def _check_contexts(self, contexts: Sequence[Segment]) -> None:
        lengths = [len(context.ids) for context in contexts]
        limits = self.settings
        if max(lengths, default=0) > limits.document_tokens:
            raise RequestError(
                400,
                f"a document has {max(lengths)} tokens; this server compresses at most {limits.document_tokens}. Cut "
                "it into several documents.",
                param="documents",
                code="document_too_long",
            )
        if sum(lengths) > limits.request_tokens:
            raise RequestError(
                400,
                f"the documents have {sum(lengths)} tokens; this server takes at most {limits.request_tokens} in a "
                "request. Send fewer.",
                param="documents",
                code="too_many_tokens",
            )

    def _fitting(self, options: Options, rows: int) -> Options:
        """The options for a prompt of that many rows. Raises RequestError if it is too long for the decoder."""
        limit = self.max_rows
        if options.is_default_length:
            options = replace(options, max_tokens=max(1, min(options.max_tokens, limit - rows)))
        if rows + options.max_tokens > limit:
            raise RequestError(
                400,
                f"the prompt has {rows} tokens and vectors, and {options.max_tokens} new tokens were requested; the "
                f"decoder reads at most {limit} in all. Shorten the prompt or lower max_tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        return options
