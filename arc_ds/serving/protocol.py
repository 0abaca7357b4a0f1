"""OpenAI's formats: bodies of requests, answers, streamed chunks and errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from arc_ds.inference.generate import Sampling
from arc_ds.serving.settings import Settings

Kind = Literal["chat", "completion"]
Finish = Literal["stop", "length"]
# Fields of OpenAI's API that this server does not compute, and their values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
# Clearer words for pydantic's kinds of errors.
_WORDS = {"model_type": "expected an object", "missing": "the field is missing"}


class RequestError(Exception):
    """A request that gets an error as answer, in OpenAI's format.

    status: HTTP status.
    message: the fault and its remedy.
    param: the field at fault.
    code: OpenAI's short name for the fault.
    headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def queue_full(message: str) -> RequestError:
    """Too many requests or documents wait."""
    return RequestError(429, message, code="queue_full", headers={"retry-after": "1"})


def to_json(plain: Any) -> str:
    """JSON in ASCII, because messages may quote lone surrogates, which UTF-8 cannot encode."""
    return json.dumps(plain, ensure_ascii=True, separators=(",", ":"))


def _text_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_as_part(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _text_as_document(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError("expected a text, or an object with the field `text`")
    return {"text": value} if isinstance(value, str) else value


def _text_or_ids(value: Any) -> Any:
    only = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list) else value
    are_ids = isinstance(only, list) and all(type(idx) is int and 0 <= idx < 2**31 for idx in only)
    if not are_ids and not isinstance(only, str | None):
        raise ValueError("expected a text, or a list of token ids")
    return only


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class DocumentBody(_Body):
    text: Annotated[str, Field(min_length=1)]


class PartBody(_Body):
    type: Literal["text", "document"]
    text: str


class MessageBody(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[PartBody] | None, BeforeValidator(_text_as_part)] = None


class StreamOptions(_Body):
    include_usage: bool | None = False


_MAX_ITEMS = 10_000  # validating more takes long; the settings of a server allow fewer
Documents = Annotated[list[Annotated[DocumentBody, BeforeValidator(_text_as_document)]], Field(max_length=_MAX_ITEMS)]


class _RequestBody(_Body):
    model: str | None = None


B = TypeVar("B", bound=_RequestBody)


class GenerationBody(_RequestBody):
    """The fields that chat and completions share."""

    documents: Documents | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(max_length=16),
            BeforeValidator(_text_as_list),
        ]
        | None
    ) = None


class ChatBody(GenerationBody):
    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=_MAX_ITEMS)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionBody(GenerationBody):
    """A text, ids of the decoder's tokenizer, or `prompt_embeds` as vLLM takes them."""

    prompt: Annotated[Any, BeforeValidator(_text_or_ids)] = None
    prompt_embeds: str | None = None
    return_token_ids: bool | None = False


class CompressBody(_RequestBody):
    documents: Annotated[Documents, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an answer is generated.

    max_tokens: maximum number of new tokens.
    sampling: choice of tokens.
    stop: texts that end the answer. They are no part of it.
    skip_space: whether one space at the beginning of the answer belongs to the template.
    is_default_length: whether the request states no max_tokens, so that a long prompt may lower it.
    """

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    skip_space: bool = False
    is_default_length: bool = False


class Delta(NamedTuple):
    """A piece of an answer.

    text: new text, possibly none.
    num_tokens: tokens generated so far.
    finish: reason of the end; None before it.
    ids: all tokens of the answer, at its end; None if they are unknown.
    """

    text: str
    num_tokens: int
    finish: Finish | None = None
    ids: tuple[int, ...] | None = None


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises RequestError."""
    try:
        plain = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8 ({error}). Send JSON in UTF-8.", code="invalid_utf8") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(
            400, f"the body is not valid JSON: {error}. Send one JSON object.", code="invalid_json"
        ) from error
    if not isinstance(plain, dict):
        raise RequestError(400, f"the body is a JSON {type(plain).__name__}; expected an object", code="invalid_json")
    return plain


def read_body(kind: type[B], plain: dict[str, Any], settings: Settings) -> B:
    """Check the fields of a body. Raises RequestError that names the first field at fault."""
    for name, harmless in _REFUSED.items():
        value = plain.get(name)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
        ):
            raise RequestError(
                400, f"`{name}` is not supported by this server: leave it out", param=name, code="unsupported_parameter"
            )
    try:
        body = kind.model_validate(plain)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))
        message = _WORDS.get(first["type"], first["msg"]).removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        raise RequestError(400, f"`{param}`: {message}", param=param, code="invalid_value") from failure
    if body.model not in (None, settings.name):
        raise RequestError(
            404,
            f"the model {body.model!r} does not exist here; this server has {settings.name!r}",
            param="model",
            code="model_not_found",
        )
    return body


def read_options(body: GenerationBody, settings: Settings, template_stops: tuple[str, ...] = ()) -> Options:
    """How the answer to a body is generated. Raises RequestError if it asks for too many tokens."""
    asked = body.max_tokens if not isinstance(body, ChatBody) else body.max_completion_tokens or body.max_tokens
    max_tokens = settings.default_tokens if asked is None else asked
    if max_tokens > settings.max_tokens:
        raise RequestError(
            400,
            f"{max_tokens} new tokens were requested; this server makes at most {settings.max_tokens}",
            param="max_tokens",
        )
    seed = secrets.randbits(63) if body.seed is None else body.seed
    top_p = 1.0 if body.top_p is None else body.top_p
    sampling = Sampling(temperature=body.temperature or 0.0, top_p=top_p, seed=seed)
    stop = (*(body.stop or ()), *template_stops)
    return Options(max_tokens=max_tokens, sampling=sampling, stop=stop, is_default_length=asked is None)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counts of a request. The first two are OpenAI's.

    prompt_tokens: rows of the decoder's prompt: text tokens and compressed rows.
    completion_tokens: tokens of the answer.
    encoder_tokens: tokens that were compressed.
    compressed_rows: rows that the decoder read in their place.
    cached_documents: documents whose vectors were in the cache.
    """

    prompt_tokens: int
    completion_tokens: int
    encoder_tokens: int
    compressed_rows: int
    cached_documents: int

    def to_json(self) -> dict[str, int]:
        return {**vars(self), "total_tokens": self.prompt_tokens + self.completion_tokens}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The fields that answer and chunks of one request share."""

    kind: Kind
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(
        self, text: str, finish: Finish | None, usage: Usage, ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """A whole answer. `ids`: its tokens, if the request wants them and they are known."""
        content = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        named = {} if ids is None else {"token_ids": list(ids)}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish, **named}
        return self._frame(name, [choice], usage)

    def chunk(self, text: str, finish: Finish | None, *, is_first: bool) -> dict[str, Any]:
        """One event of a stream. The first one of a chat names the role."""
        delta = {**({"role": "assistant"} if is_first else {}), **({"content": text} if text or is_first else {})}
        content: dict[str, Any] = {"delta": delta} if self.kind == "chat" else {"text": text}
        return self._frame(self._chunk_name, [{"index": 0, **content, "logprobs": None, "finish_reason": finish}])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._frame(self._chunk_name, [], usage)

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _frame(self, name: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        plain = {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}
        return {**plain, "choices": choices, **({"usage": usage.to_json()} if usage else {})}
