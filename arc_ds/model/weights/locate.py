"""Detect the kind of weights at a path and their files. The content decides, never a setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arc_ds.errors import WeightsError
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.names import join_faults
from arc_ds.system.user_files import check_downloaded
from arc_ds.tokenizers.gguf_header import gguf_models, gguf_parts

_INDEX = "model.safetensors.index.json"
_EXPECTED = (
    "a Hugging Face folder (config.json with model.safetensors or its shards), a Meta, Mistral or OLMo folder "
    "(params.json with consolidated.safetensors, consolidated.00.pth, ... or model.safetensors), or a .gguf file"
)
_NUMBERED = re.compile(r"consolidated\.(\d+)\.(?:pth|safetensors)")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Weights at a path.

    kind: kind of weights.
    path: the folder, or the first file of a GGUF model.
    files: files with tensors; empty if there are only sizes.
    """

    kind: Literal["hugging_face", "native", "gguf"]
    path: Path
    files: tuple[Path, ...]

    @property
    def model_parallel(self) -> tuple[tuple[Path, ...], ...]:
        """The files of each set in which every file holds parts of all tensors."""
        numbered = [file for file in self.files if self.kind == "native" and _NUMBERED.fullmatch(file.name)]
        sets = (tuple(file for file in numbered if file.suffix == suffix) for suffix in (".pth", ".safetensors"))
        return tuple(files for files in sets if len(files) > 1)

    @property
    def config_file(self) -> Path:
        """The file with the sizes."""
        names = {"hugging_face": "config.json", "native": "params.json"}
        return self.path / names[self.kind] if self.kind in names else self.path


def locate(path: Path) -> WeightFiles:
    """Detect the weights at `path`.

    Raises WeightsError if it does not exist, contains nothing readable, or lacks some shards of a set.
    """
    if path.is_file():
        if _is_gguf(path):
            return _gguf_files(gguf_parts(path))
        check_downloaded(path, WeightsError)
        raise WeightsError(f"{path} is a file but not GGUF; expected {_EXPECTED}. Pass the folder that contains it.")
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist; expected {_EXPECTED}. Check the path and its mounts.")
    return _locate_in_folder(path)


def _locate_in_folder(folder: Path) -> WeightFiles:
    has_config, has_params = (folder / "config.json").is_file(), (folder / "params.json").is_file()
    hugging_face = _safetensors_files(folder) if has_config else ()
    if hugging_face:
        return WeightFiles(kind="hugging_face", path=folder, files=hugging_face)
    native = (_native_files(folder) or _safetensors_files(folder)) if has_params else ()
    if native:
        return WeightFiles(kind="native", path=folder, files=native)
    models = gguf_models(folder)
    if len(models) == 1:
        return _gguf_files(models[0])
    if len(models) > 1:
        names = ", ".join(parts[0].name for parts in models)
        raise WeightsError(f"{folder} holds {len(models)} GGUF models ({names}). Pass the path of one file.")
    if has_config or has_params:
        return WeightFiles(kind="hugging_face" if has_config else "native", path=folder, files=())
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder} holds an adapter; expected a whole model. Merge the adapter into its model first (peft: "
            "model.merge_and_unload().save_pretrained(FOLDER))."
        )
    listing = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise WeightsError(f"{folder} holds {listing}; expected {_EXPECTED}. Check the path.")


def _safetensors_files(folder: Path) -> tuple[Path, ...]:
    """The files of an index, or all without one. Other programs prefer a model.safetensors to the index."""
    if not (folder / _INDEX).is_file():
        return tuple(p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith("consolidated"))
    index = Fields.read(folder / _INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index.wrong("weight_map", "an object that maps tensors to files", weight_map)
    files = [folder / str(name) for name in sorted({*map(str, weight_map.values())})]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(
            f"{folder}: {_INDEX} names {len(files)} files, but {_are_missing(missing)} If the index is that of an "
            "earlier set of files, delete it: then all .safetensors files are read."
        )
    alone = folder / "model.safetensors"
    return tuple(files) if alone in files or not alone.is_file() else (*files, alone)


def _are_missing(names: list[str]) -> str:
    return f"{join_faults(names)} {'is' if len(names) == 1 else 'are'} missing. Copy the missing files from the source."


def _native_files(folder: Path) -> tuple[Path, ...]:
    safetensors = sorted(folder.glob("consolidated*.safetensors"))
    pickles = sorted(folder.glob("consolidated.*.pth"))
    numbers = [int(match.group(1)) for p in pickles if (match := _NUMBERED.fullmatch(p.name))]
    if numbers != list(range(len(pickles))):
        raise WeightsError(
            f"{folder} holds {', '.join(p.name for p in pickles)}; expected consolidated.00.pth, ... without gaps. "
            "Copy the missing files from the source."
        )
    return (*safetensors, *pickles)


def _gguf_files(parts: tuple[Path, ...]) -> WeightFiles:
    missing = [path.name for path in parts if not path.is_file()]
    if missing:
        raise WeightsError(f"{parts[0].parent}: the GGUF model has {len(parts)} files, but {_are_missing(missing)}")
    return WeightFiles(kind="gguf", path=parts[0], files=parts)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
