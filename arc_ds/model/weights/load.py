"""Load files into a module's parameters one tensor at a time, including parameters partitioned by ZeRO-3.

Each rank reads only the rows that its own partitions need, without communication. `tools/bench_load.py` compares this
with one rank that reads and broadcasts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from arc_ds.errors import ArcError, WeightsError
from arc_ds.model.weights.names import NamePredicate, Shape, join_faults, no_name, shape_faults
from arc_ds.model.weights.stores import ALL_ROWS
from arc_ds.system import dist
from arc_ds.system.device import peak_memory_bytes

logger = logging.getLogger(__name__)

_BAR_DELAY_S = 3.0  # shorter loads show no bar


class TensorSource(Protocol):
    """Tensors by internal name, from a backbone's files or an ARC checkpoint."""

    @property
    def path(self) -> Path:
        """Origin of the tensors, for messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, without reading it."""

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a tensor, or a slice of its dimension 0, to the CPU."""


def load_backbone(
    module: nn.Module,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    prefix: str = "",
    skip: NamePredicate = no_name,
    allow_unused: NamePredicate = no_name,
    name: str = "weights",
) -> None:
    """Copy tensors into the parameters of `module` by name, one tensor at a time. Calls `check_fit` first.

    dtype: final dtype of the parameters; None keeps each parameter's dtype.
    device: device of the tensors that replace parameters on "meta"; None for the CPU.
    prefix: see `check_fit`.
    skip: see `check_fit`.
    allow_unused: see `check_fit`.
    name: the module in the log and on the progress bar.

    Rank 0 logs time, bytes read, and the peak memory of its process on the host. If parameters are partitioned by
    ZeRO-3, all ranks must call this, before an engine is built. Each rank then reads the rows of its own partitions.
    Parameters keep the dtype in which they were partitioned. If one rank cannot read, all ranks raise the error.
    """
    check_fit(module, source, prefix=prefix, skip=skip, allow_unused=allow_unused)
    names = _parameter_names(module, prefix, skip)
    start, num_bytes = time.monotonic(), 0
    failure: Exception | None = None
    with _progress_bar(name, len(names)) as bar:
        for parameter_name, source_name in names.items():
            parameter = module.get_parameter(parameter_name)
            if not _is_partitioned(parameter):
                tensor = source.tensor(source_name)
                _fill(module, parameter_name, tensor, dtype, device)
                num_bytes += tensor.nbytes
            elif _is_on_nvme(parameter):
                failure = _fill_gathered(parameter, source, source_name) or failure
            elif failure is None:
                try:
                    num_bytes += _fill_partitions(parameter, source, source_name)
                except Exception as error:  # raised below on all ranks, which would otherwise hang
                    failure = error if isinstance(error, ArcError) else WeightsError(str(error))
            bar.update()
    if any(_is_partitioned(parameter) for parameter in module.parameters()):
        dist.raise_together(failure)
    _log(name, source, num_bytes, time.monotonic() - start)


def check_fit(
    module: nn.Module,
    source: TensorSource,
    *,
    prefix: str = "",
    skip: NamePredicate = no_name,
    allow_unused: NamePredicate = no_name,
) -> None:
    """Check that `load_backbone` can fill the module. Reads names and shapes only; the module may be on "meta".

    prefix: only parameters whose names start with it are filled. The rest of the name is the name in the source.
    skip: predicate on names without prefix; matching parameters keep their values, such as an encoder's memory tokens.
    allow_unused: predicate on names in the source that may remain unused, such as `names.beyond_layers(n)` for an
        encoder.

    Raises WeightsError that lists parameters without a tensor or with another shape, and unused tensors.
    """
    names = _parameter_names(module, prefix, skip)
    expected = {in_source: _full_shape(module.get_parameter(name)) for name, in_source in names.items()}
    unused = sorted(name for name in source.shapes.keys() - expected.keys() if not allow_unused(name))
    faults = shape_faults(expected, source.shapes) + [f"`{name}` has no place in the model" for name in unused]
    if faults:
        raise WeightsError(
            f"{source.path} does not fit the model: {join_faults(faults)}. Check that the model was built from the "
            "sizes of these weights; for an ARC checkpoint, that encoder_backbone is the backbone that it was trained "
            "from."
        )


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the values of one parameter. It may be on "meta" (it is replaced), partitioned (rank 0's values) or whole."""
    parameter = module.get_parameter(name)
    if parameter.is_meta:
        _fill(module, name, tensor, None, None)
        return
    with gathered([parameter]):
        copy_into(parameter, tensor)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has partitioned, within the context. Changes by rank 0 reach all ranks.

    A collective if one of the parameters is partitioned.
    """
    partitioned = [parameter for parameter in parameters if _is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy values and cast to the parameter's dtype. Raises ValueError if the shapes differ (copy_ would broadcast)."""
    if parameter.shape != tensor.shape:
        raise ValueError(f"a parameter of shape {list(parameter.shape)} cannot hold a tensor {list(tensor.shape)}")
    with torch.no_grad():
        parameter.copy_(tensor)


def _parameter_names(module: nn.Module, prefix: str, skip: NamePredicate) -> dict[str, str]:
    """Names of the parameters to fill, and their names in the source."""
    names = [name for name, _ in module.named_parameters() if name.startswith(prefix)]
    return {name: name[len(prefix) :] for name in names if not skip(name[len(prefix) :])}


def _fill(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> None:
    parameter = module.get_parameter(name)
    target = dtype or parameter.dtype
    if parameter.is_meta:
        # Copy: a tensor of a memory-mapped file would keep the file open and change with it.
        values = tensor.to(device=device or "cpu", dtype=target, copy=True).contiguous()
        _replace(module, parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))
        return
    if parameter.dtype != target:
        parameter.data = parameter.data.to(target)
    copy_into(parameter, tensor)


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace `old` by `new` in all modules, because a tied head shares the embedding's parameter."""
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(owner, leaf, new)


def _fill_partitions(parameter: Any, source: TensorSource, name: str) -> int:
    """Fill this rank's partitions of a parameter. Reads only the rows in them. Returns the number of bytes read."""
    num_bytes = 0
    values_per_row = parameter.ds_numel // parameter.ds_shape[0]
    for partition, start in _partitions(parameter):
        end = min(start + partition.numel(), parameter.ds_numel)  # the last partitions may be padded
        if start < end:
            rows = slice(start // values_per_row, -(-end // values_per_row))
            tensor = source.tensor(name, rows)
            before = rows.start * values_per_row
            partition[: end - start].copy_(tensor.reshape(-1)[start - before : end - before])
            num_bytes += tensor.nbytes
    return num_bytes


def _partitions(parameter: Any) -> Iterator[tuple[Tensor, int]]:
    """This rank's flat partitions of a parameter, and the index of their first value in the parameter.

    With hpZ there are two: one of all ranks' partitions, and one of those of the ranks on this host.
    """
    yield parameter.ds_tensor, parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
    secondary = parameter.ds_secondary_tensor
    if secondary is not None:
        rank_in_group = torch.distributed.get_rank(parameter.ds_zero_param_process_group)
        yield secondary, rank_in_group * secondary.numel()


def _fill_gathered(parameter: nn.Parameter, source: TensorSource, name: str) -> Exception | None:
    """Fill one gathered parameter. Returns a read error instead of raising it: the other ranks wait in the gather."""
    with gathered([parameter]):
        if dist.rank() != 0:
            return None
        try:
            copy_into(parameter, source.tensor(name))
        except Exception as error:  # the caller raises it on all ranks, which would otherwise hang
            return error if isinstance(error, ArcError) else WeightsError(str(error))
    return None


def _progress_bar(name: str, num_tensors: int) -> tqdm:
    """A bar on rank 0's terminal, if loading takes long. Without a terminal it shows nothing."""
    disable = None if dist.is_main() else True
    return tqdm(desc=f"load {name}", total=num_tensors, unit="tensor", leave=False, delay=_BAR_DELAY_S, disable=disable)


def _log(name: str, source: TensorSource, num_bytes: int, seconds: float) -> None:
    speed, peak = num_bytes / max(seconds, 1e-9), peak_memory_bytes(torch.device("cpu"))
    logger.info(
        "loaded %s from %s: each rank read %.2f GB in %.1f s, %.0f MB/s, peak memory %.0f MiB",
        name,
        source.path,
        num_bytes / 1e9,
        seconds,
        speed / 1e6,
        peak / (1 << 20),
    )


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _is_on_nvme(parameter: Any) -> bool:
    """Whether the partitions are in files of DeepSpeed, which only a gather writes."""
    return parameter.ds_tensor.final_location is not None


def _full_shape(parameter: nn.Parameter) -> Shape:
    """Shape of the whole parameter (a ZeRO-3 partition looks empty)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
