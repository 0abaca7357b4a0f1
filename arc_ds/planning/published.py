"""Sizes of well-known models by the name of their folder, for plans that are made before anything is downloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from arc_ds.errors import ConfigError

PUBLISHED_FILE = Path(__file__).parent / "published_configs.json"
# Parts of a folder's name that do not change the sizes: the owner, what the model was tuned for, a date, a format.
_UNIMPORTANT = re.compile(r"^meta-?|instruct|chat|base|hf|\bit\b|gguf|(?<!\d)\d{4}(?!\d)", re.IGNORECASE)


def published_models() -> dict[str, dict[str, Any]]:
    """By name: the `source`, the published number of `parameters`, and the keys of config.json that decide the sizes.

    The number is exact, or a text in billions as rounded on the model's page. A test compares both with transformers.
    """
    return json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))


def find_published(path: str) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of the model that a folder would hold, by the folder's name.

    Raises ConfigError if no published model has this name.
    """
    models = published_models()
    wanted = _key(Path(path).name)
    for name, model in models.items():
        if _key(name) == wanted:
            return name, model["config"]
    raise ConfigError(
        f"{path} does not exist, and {Path(path).name} is no model whose sizes `arc-ds plan` knows: "
        f"{', '.join(sorted(models))}. Name the folder like one of them, or download its config.json into a folder "
        "and give that path: a plan needs no other file."
    )


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _UNIMPORTANT.sub("", name).lower())
