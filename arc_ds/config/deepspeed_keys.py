"""The keys that DeepSpeed's JSON may have, read from the installed DeepSpeed.

DeepSpeed itself ignores typos, or reports them badly.
"""

from __future__ import annotations

from collections.abc import KeysView, Mapping
from functools import cache
from typing import Any, get_args

from arc_ds.config.decode import nearest
from arc_ds.errors import ConfigError

# Sections that DeepSpeed reads key by key, without a class that lists their fields.
_PLAIN_SECTIONS = ("data_types", "activation_checkpointing")
# A section's keys by name. None: any value is allowed.
Known = Mapping[str, "Known | None"]


def check_keys(config: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError on a key that DeepSpeed does not know, with the nearest known one.

    Checks the top level, zero_optimization with its own sections, bf16, fp16, data_types and activation_checkpointing.

    config: the JSON's content.
    name: the file's name, for messages.
    """
    _check_section(config, known_keys(), name, "")


def check_values(config: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError on a value in zero_optimization or bf16 that DeepSpeed rejects. Call `check_keys` first."""
    from pydantic import ValidationError

    for section, model in _models().items():
        try:
            model(**config.get(section, {}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join((section, *map(str, first["loc"])))
            raise ConfigError(f"{name}: {path} is {first['input']!r}: {first['msg']}. Fix that value.") from None


@cache
def known_keys() -> Known:
    """The keys of the JSON as a tree. Imports DeepSpeed."""
    from deepspeed.runtime.config import DeepSpeedConfig

    plain = {section: _KeyRecorder() for section in _PLAIN_SECTIONS}
    recorder = _KeyRecorder(plain)
    # DeepSpeed's reader looks up every possible key, even in an almost empty config.
    DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(recorder)
    known: dict[str, Known | None] = dict.fromkeys(sorted(recorder.names))
    known |= {section: dict.fromkeys(sorted(keys.names)) for section, keys in plain.items()}
    return known | {section: _fields(model) for section, model in _models().items()}


def _models() -> dict[str, Any]:
    """DeepSpeed's pydantic classes, by section."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}


def _fields(model: Any) -> Known:
    """The keys of a section: names and aliases of its fields. A field that is a section has keys of its own."""
    known: dict[str, Known | None] = {}
    for name, field in model.model_fields.items():
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
        keys = _fields(inner[0]) if inner else None
        known |= {key: keys for key in (name, field.alias) if key}
    return known


def _check_section(section: Mapping[str, Any], known: Known, name: str, prefix: str) -> None:
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"{name}: unknown key {prefix}{key}. {nearest(key, known)}")
        keys = known[key]
        if keys is not None and isinstance(value, Mapping):
            _check_section(value, keys, name, f"{prefix}{key}.")


class _KeyRecorder(dict[str, Any]):
    """A dict that records every key lookup."""

    def __init__(self, content: Mapping[str, Any] | None = None) -> None:
        super().__init__(content or {})
        self.names: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)  # its `in` calls our __contains__; that of dict's own keys() does not
