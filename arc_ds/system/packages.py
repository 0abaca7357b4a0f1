"""Packages that only some commands need. `setup.py` has the extras that install them."""

from __future__ import annotations

from importlib.util import find_spec

from arc_ds.errors import ConfigError

_EXTRAS = {
    "train": ("deepspeed", "fsspec", "matplotlib", "mlflow", "triton", "webdataset"),
    "backbones": ("gguf", "tiktoken", "tokenizers"),
    "serve": ("aiohttp", "fastapi", "prometheus_client", "uvicorn"),
    "shards": ("pyarrow", "zstandard"),
    "ray": ("ray",),
    "datatrove": ("datatrove",),
    "eval": ("bm25s", "rouge_score", "sacrebleu"),
}


def missing_package(package: str) -> ConfigError | None:
    """The error for a package that is not installed; None if no extra of ARC-DS has it.

    package: its name, or that of a module in it.
    """
    package = package.partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return ConfigError(
                f"this needs {package}, which is not installed. Run: pip install 'arc-ds[{extra}]' (in a clone of the "
                f"repository: pip install -e '.[{extra}]')"
            )
    return None


def require(package: str) -> None:
    """Raise ConfigError if a package of an extra is not installed. Does not import it."""
    if find_spec(package) is None and (error := missing_package(package)) is not None:
        raise error
