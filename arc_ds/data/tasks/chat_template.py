"""The chat template in a tokenizer's files, rendered around placeholders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from arc_ds.errors import TokenizerError
from arc_ds.system.user_files import read_user_text
from arc_ds.tokenizers import Tokenizer
from arc_ds.tokenizers.base import parse_json, require
from arc_ds.tokenizers.gguf_header import read_gguf_header

QUESTIONS = ("ArcDsFirstQuestion", "ArcDsLastQuestion")
ANSWERS = ("ArcDsFirstAnswer", "ArcDsLastAnswer")
_CURE = "Set the decoder's chat_template to llama2, chatml or none."
_GGUF_KEY = "tokenizer.chat_template"
# The date for templates that write one. Today's date would make samples depend on the day.
_DATE = "26 Jul 2024"


def render_template(tokenizer: Tokenizer, path: Path) -> str:
    """The template's text of two turns of placeholders: QUESTIONS and ANSWERS in turn, each once.

    Raises TokenizerError if there is no template, jinja2 is missing, or the template fails or does not keep the turns.
    """
    folder = path if path.is_dir() else path.parent
    settings_file = folder / "tokenizer_config.json"
    settings = parse_json(settings_file.read_bytes(), settings_file) if settings_file.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    by_id: dict[int | None, str] = {idx: name for name, idx in tokenizer.special_ids.items()}
    names = {
        "bos_token": _content(settings.get("bos_token")) or by_id.get(tokenizer.bos_id, ""),
        "eos_token": _content(settings.get("eos_token")) or by_id.get(tokenizer.eos_id, ""),
    }
    marks = [mark for turn in zip(QUESTIONS, ANSWERS, strict=True) for mark in turn]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    written = _render(_find_template(path, folder, settings), messages, names, path)
    places = [written.find(mark) for mark in marks]
    if -1 in places or places != sorted(places) or any(written.count(mark) != 1 for mark in marks):
        raise TokenizerError(
            f"the chat template of {path} does not write two turns of user and assistant one after the other, with "
            f"each text once. {_CURE}"
        )
    return written


def _find_template(path: Path, folder: Path, settings: dict[str, Any]) -> str:
    """The template next to or inside a tokenizer.

    It may be in chat_template.jinja, in tokenizer_config.json (`settings`), or in a GGUF file's metadata.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_user_text(folder / "chat_template.jinja", TokenizerError, remedy=_CURE)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    gguf_files = [path] if path.suffix == ".gguf" else sorted(folder.glob("*.gguf")) if path.is_dir() else []
    if template is None and len(gguf_files) == 1:
        try:
            template = read_gguf_header(gguf_files[0]).metadata.get(_GGUF_KEY)
        except ValueError as error:
            raise TokenizerError(f"chat template of {gguf_files[0]}: {error}. Copy the file again.") from error
    if not isinstance(template, str):
        raise TokenizerError(
            f"chat_template is tokenizer, but {path} has none: expected chat_template.jinja, the key chat_template "
            f"of tokenizer_config.json, or the metadata {_GGUF_KEY} of a GGUF file. {_CURE}"
        )
    return template


def _render(template: str, messages: list[dict[str, str]], names: dict[str, str], path: Path) -> str:
    jinja2 = require("jinja2", path)
    environment = require("jinja2.sandbox", path).ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=False, date_string=_DATE, **names
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise TokenizerError(f"the chat template of {path} cannot be rendered: {error}. {_CURE}") from error


def _raise(message: str) -> NoReturn:
    """The function that templates call to reject messages."""
    raise ValueError(message)


def _content(token: object) -> str:
    """A special token's text, from a string or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
