"""Ranks that differ in software, settings, config or files would hang or silently train different models."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arc_ds.errors import ConfigError
from arc_ds.system import dist

_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "tiktoken", "tokenizers", "transformers", "triton")
_SETTINGS = re.compile(r"(TORCH_)?(NCCL|GLOO)_.*")
# Settings that name devices and files of a host.
_OF_HOSTS = re.compile(
    r"(NCCL|GLOO)_SOCKET_IFNAME|NCCL_(IB_HCA|IB_GID_INDEX|TOPO_FILE|GRAPH_\w*|DEBUG\w*|CONF_FILE|HOSTID)"
)
_ABSENT = "nothing"
_MAX_SHOWN = 8
_MAX_CHARACTERS = 60


def software() -> dict[str, str]:
    """Versions of the software that computes a step, a digest of our own code, and the settings of collectives."""
    found = {"python": platform.python_version(), "arc_ds code": _code_digest()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    settings = {name: value for name, value in os.environ.items() if _SETTINGS.fullmatch(name)}
    return found | {name: value for name, value in settings.items() if not _OF_HOSTS.fullmatch(name)}


def check_same(values: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError on all ranks if one has other values than rank 0. Collective.

    The message names each value, its ranks and their hosts.
    values: anything with a `str`, by its name in the message.
    remedy: sentence at the end of the message.
    """
    by_rank = dist.gather_objects((socket.gethostname(), {name: str(value) for name, value in values.items()}))
    names = dict.fromkeys(name for _, theirs in by_rank for name in theirs)
    differences = [words for name in names if (words := _difference(name, by_rank))]
    if differences:
        more = len(differences) - _MAX_SHOWN
        shown = "; ".join(differences[:_MAX_SHOWN]) + (f"; and {more} more differences" if more > 0 else "")
        raise ConfigError(f"the ranks do not agree. {shown}. {remedy}")


def _difference(name: str, by_rank: list[tuple[str, dict[str, str]]]) -> str | None:
    """The values of one name with their ranks, that of rank 0 last; None if all are equal."""
    places: dict[str, list[tuple[int, str]]] = {}
    for rank, (host, values) in enumerate(by_rank):
        places.setdefault(values.get(name, _ABSENT), []).append((rank, host))
    if len(places) == 1:
        return None
    *others, first = (f"{_short(value)} ({dist.ranks_in_words(ranks)})" for value, ranks in reversed(places.items()))
    return f"{name}: {', '.join(others)}, but {first}"


def _short(value: str) -> str:
    return value if len(value) <= _MAX_CHARACTERS else f"{value[:_MAX_CHARACTERS]}…"


def _code_digest() -> str:
    """Digest of our sources: two checkouts can have one version."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
