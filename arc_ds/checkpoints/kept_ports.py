"""The ports that a run keeps unchanged, in its checkpoints.

The shards hold the ports that the run trains, numbered from 0. `trainer.json` lists for each of them its place
among all ports (`port_places`). `kept_ports.safetensors` holds the others, by their final names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arc_ds.errors import CheckpointError

KEPT_NAME = "kept_ports.safetensors"
_PORT = re.compile(r"^ports\.(\d+)\.")


def write_kept_ports(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of kept ports to the folder of a checkpoint, in their own dtypes."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / KEPT_NAME)


def read_kept_ports(folder: Path) -> dict[str, Tensor]:
    """The tensors of kept ports in a checkpoint, in their own dtypes. Empty if the run keeps none."""
    path = folder / KEPT_NAME
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}. Use another checkpoint of the run.") from error


def name_in_export(name: str, places: Sequence[int] | None) -> str:
    """The name of a trained tensor among all ports.

    name: its name in the shards.
    places: `port_places` of the checkpoint; None if the run keeps no ports, as in the first version.
    """
    if places is None:
        return name
    return _PORT.sub(lambda match: f"ports.{places[int(match.group(1))]}.", name)
