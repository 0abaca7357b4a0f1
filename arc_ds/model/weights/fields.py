"""Typed access to the JSON files that describe weights. Errors name the file, the key, the value and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_ds.errors import WeightsError
from arc_ds.system.user_files import read_user_json


class Fields:
    """A JSON object and its origin. A missing or null key takes the default, if there is one."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Read the object in a JSON file. Raises WeightsError if it cannot be read or is not an object."""
        values = read_user_json(path, WeightsError, remedy="Copy it again from its source.")
        if not isinstance(values, dict):
            raise WeightsError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls(values, str(path))

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, or the default if the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def object(self, key: str, default: Mapping[str, Any] | None = None) -> Fields:
        """The object under a key."""
        value = self.get(key, default)
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object", value)
        return Fields(value, f"{self.where}: {key}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(key, f"a whole number of at least {minimum}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, as a float."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, "a number above 0", value)
        return float(value)

    def number_or_zero(self, key: str) -> float:
        """A number above 0; 0 if it is missing, null or 0."""
        return self.number(key) if self.get(key) else 0.0

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def refuse(self, key: str, *harmless: Any) -> None:
        """Raise WeightsError for an unsupported setting: any value but null, false or one of `harmless`."""
        value = self.values.get(key)
        if value is None or value is False or value in harmless:
            return
        expected = " or ".join(repr(h) for h in harmless) or "none"
        raise WeightsError(
            f"{self.where}: `{key}` is {value!r}; ARC-DS reads backbones with {expected} here. "
            "Choose another checkpoint of the family without this setting."
        )

    def refuse_quantisation(self) -> None:
        """Raise WeightsError if the object says that weights are quantised."""
        for key, value in self.values.items():
            if value and ("quant" in key or key == "compression_config"):
                method = value.get("quant_method") if isinstance(value, Mapping) else value
                raise WeightsError(
                    f"{self.where}: `{key}` says that the weights are quantised{f' ({method})' if method else ''}; "
                    "ARC-DS reads plain weights. Use the model's weights in bfloat16, or a .gguf file."
                )

    def wrong(self, key: str, expected: str, got: Any) -> WeightsError:
        """The error for a missing value or one of the wrong type."""
        found = f"it is {got!r}" if key in self.values else "it is missing"
        return WeightsError(f"{self.where}: expected `{key}` to be {expected}; {found}. Copy the file from its source.")
