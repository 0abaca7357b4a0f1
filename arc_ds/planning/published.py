"""Sizes of well-known models by the name of their folder, for plans that are made before anything is downloaded."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from arc_ds.config.schema import RunConfig
from arc_ds.errors import ConfigError

PUBLISHED_FILE = Path(__file__).parent / "published_configs.json"
# Parts of a folder's name that do not change the sizes: the owner, the purpose of tuning, a date, a format.
_UNIMPORTANT = re.compile(
    r"^meta-?|instruct|chat|base|hf|\bit\b|([.-](q\d\w*|bf16|f16|f32))?\.gguf$|(?<!\d)\d{4}(?!\d)", re.IGNORECASE
)


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


def with_published_sizes(config: RunConfig, folder: Path) -> tuple[RunConfig, tuple[str, ...]]:
    """The config with a folder of published sizes in place of each backbone that does not exist, and a line for each.

    folder: existing and empty; it gets one folder with a config.json for each of these backbones.

    Raises ConfigError like `find_published`.
    """
    lines: list[str] = []

    def existing(key: str, path: str) -> str:
        if Path(path).exists():
            return path
        name, sizes = find_published(path)
        there = folder / f"{len(lines)}"
        there.mkdir()
        (there / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
        lines.append(f"{key}: {path} does not exist; the published sizes of {name} stand.")
        return str(there)

    encoder = dataclasses.replace(config.encoder, backbone=existing("encoder.backbone", config.encoder.backbone))
    decoders = tuple(
        dataclasses.replace(one, backbone=existing(f"decoders.{idx}.backbone", one.backbone)) if one.train else one
        for idx, one in enumerate(config.decoders)
    )
    return dataclasses.replace(config, encoder=encoder, decoders=decoders), tuple(lines)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _UNIMPORTANT.sub("", name).lower())
