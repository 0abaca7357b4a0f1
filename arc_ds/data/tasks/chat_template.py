"""The chat template in a tokenizer's files, rendered around placeholders."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from arc_ds.errors import TokenizerError
from arc_ds.system.user_files import read_user_text
from arc_ds.tokenizers import Tokenizer
from arc_ds.tokenizers.base import COPY_AGAIN, read_settings, require
from arc_ds.tokenizers.gguf_header import gguf_models, gguf_parts, read_gguf_header

QUESTIONS = ("ArcDsFirstQuestion", "ArcDsLastQuestion")
ANSWERS = ("ArcDsFirstAnswer", "ArcDsLastAnswer")
_CURE = (
    "Put a template that works into chat_template.jinja next to the tokenizer, or set the decoder's chat_template to "
    "llama2, chatml or none."
)
_GGUF_KEY = "tokenizer.chat_template"
# The date for templates that write one. Today's date would make samples depend on the day.
_DATE = datetime(2024, 7, 26)


def render_template(tokenizer: Tokenizer, path: Path) -> str:
    """The template's text of two turns of placeholders: QUESTIONS and ANSWERS in turn, each once.

    Raises TokenizerError if there is no template, jinja2 is missing, or the template fails or does not keep the turns.
    """
    folder = path if path.is_dir() else path.parent
    settings = read_settings(folder / "tokenizer_config.json")
    names = _special_tokens(tokenizer, read_settings(folder / "special_tokens_map.json"), settings)
    marks = [mark for turn in zip(QUESTIONS, ANSWERS, strict=True) for mark in turn]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    template = find_template(path)
    if template is None:
        raise TokenizerError(
            f"chat_template is tokenizer, but {path} has none: expected chat_template.jinja, the key chat_template "
            f"of tokenizer_config.json, or the metadata {_GGUF_KEY} of a GGUF file. {_CURE}"
        )
    written = _render(template, messages, names, path)
    places = [written.find(mark) for mark in marks]
    if -1 in places or places != sorted(places) or any(written.count(mark) != 1 for mark in marks):
        raise TokenizerError(
            f"the chat template of {path} does not write two turns of user and assistant one after the other, with "
            f"each text once. {_CURE}"
        )
    return written


def find_template(path: Path) -> str | None:
    """The template of a tokenizer's file or folder; None if there is none.

    It may be in chat_template.jinja, in tokenizer_config.json, or in a GGUF file's metadata. Raises TokenizerError if
    one of these cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "chat_template.jinja").is_file():
        return read_user_text(folder / "chat_template.jinja", TokenizerError, remedy=COPY_AGAIN)
    template = read_settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (item for item in template if isinstance(item, dict))
        template = next((item.get("template") for item in named if item.get("name") == "default"), None)
    models = [gguf_parts(path)] if path.suffix == ".gguf" else gguf_models(folder) if path.is_dir() else []
    if template is None and len(models) == 1:
        file, *_ = models[0]
        try:
            template = read_gguf_header(file).metadata.get(_GGUF_KEY)
        except (OSError, ValueError) as error:
            raise TokenizerError(f"chat template of {file}: {error}. Copy the file again.") from error
    return template if isinstance(template, str) else None


def _render(template: str, messages: list[dict[str, str]], names: dict[str, Any], path: Path) -> str:
    environment = _environment(path)
    given = {**names, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        return environment.from_string(template).render(date_string=_DATE.strftime("%d %b %Y"), **given)
    except Exception as error:  # a template is a program: it can raise anything
        raise TokenizerError(
            f"the chat template of {path} cannot be rendered: {error or type(error).__name__}. {_CURE}"
        ) from error


def _environment(path: Path) -> Any:
    """The functions, filters and tags that the transformers library gives to every template.

    Source: https://huggingface.co/docs/transformers/chat_templating_writing
    """
    jinja2 = require("jinja2", path)

    class Generation(require("jinja2.ext", path).Extension):  # type: ignore[misc]
        """The tag `generation` marks an assistant's words for a loss mask. Here it writes them like other text."""

        tags = frozenset(("generation",))

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = require("jinja2.sandbox", path).ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals.update(raise_exception=_raise, strftime_now=_DATE.strftime)
    environment.filters["tojson"] = _to_json
    return environment


def _raise(message: str) -> NoReturn:
    """The function that templates call to reject messages."""
    raise ValueError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _special_tokens(tokenizer: Tokenizer, *files: dict[str, Any]) -> dict[str, Any]:
    """The special tokens that a template reads by name: bos_token, pad_token, and others of the tokenizer's files.

    files: contents of the tokenizer's settings; later ones take precedence.
    """
    by_id = {idx: name for name, idx in tokenizer.special_ids.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names: dict[str, Any] = {name: "" if idx is None else by_id.get(idx, "") for name, idx in ids.items()}
    for settings in files:
        extra = settings.get("extra_special_tokens")
        named = {**(extra if isinstance(extra, dict) else {}), **settings}
        names.update(
            {key: _content(token) for key, token in named.items() if key.endswith("_token") and _content(token)}
        )
        if isinstance(settings.get("additional_special_tokens"), list):
            names["additional_special_tokens"] = [_content(token) for token in settings["additional_special_tokens"]]
    return names


def _content(token: object) -> str:
    """A special token's text, from a string or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
