"""A client of `arc-ds serve` for the adapters. It needs no package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from arc_ds.errors import StorageError

Message = Mapping[str, str]


def ask(
    base_url: str,
    messages: Iterable[Message],
    documents: Iterable[str] = (),
    *,
    api_key: str | None = None,
    timeout_s: float = 300.0,
    **options: Any,
) -> str:
    """The answer to a chat about documents. Raises StorageError with the server's words if there is none.

    base_url: address of the server, with /v1.
    api_key: the key that the server requires (default: the variable ARC_API_KEY, if it is set).
    messages: with "role" and "content".
    documents: texts that the decoder reads in compressed form.
    options: further fields of the request, such as max_tokens.
    """
    api_key = api_key or os.environ.get("ARC_API_KEY")
    key = {"authorization": f"Bearer {api_key}"} if api_key else {}
    body = json.dumps({"messages": list(messages), "documents": list(documents), **options}).encode()
    url = f"{base_url.rstrip('/')}/chat/completions"
    try:
        with urlopen(Request(url, body, {"content-type": "application/json", **key}), timeout=timeout_s) as response:
            return json.load(response)["choices"][0]["message"]["content"]
    except HTTPError as error:
        raise StorageError(f"{url} answered {error.code}: {_message(error.read())}") from error
    except (URLError, OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{url} gave no answer ({error}). Check that `arc-ds serve` runs there.") from error


def _message(raw: bytes) -> str:
    try:
        return json.loads(raw)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return raw[:200].decode("utf-8", "replace")
