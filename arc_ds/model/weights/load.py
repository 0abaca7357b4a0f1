"""Load files into a module's parameters one tensor at a time, including parameters partitioned by ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from arc_ds.errors import ArcError, WeightsError
from arc_ds.model.weights.names import NamePredicate, Shape, join_faults, no_name, shape_faults
from arc_ds.system import dist


class TensorSource(Protocol):
    """Tensors by internal name, from a backbone's files or an ARC checkpoint."""

    @property
    def path(self) -> Path:
        """Origin of the tensors, for messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, without reading it."""

    def tensor(self, name: str) -> Tensor:
        """Read one tensor to the CPU."""


def load_backbone(
    module: nn.Module,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    prefix: str = "",
    skip: NamePredicate = no_name,
    allow_unused: NamePredicate = no_name,
) -> None:
    """Copy tensors into the parameters of `module` by name, one tensor at a time. Calls `check_fit` first.

    dtype: final dtype of the parameters; None keeps each parameter's dtype.
    device: device of the tensors that replace parameters on "meta"; None for the CPU.
    prefix: see `check_fit`.
    skip: see `check_fit`.
    allow_unused: see `check_fit`.

    Under ZeRO-3 all ranks must call this. Parameters are gathered one at a time and only rank 0 reads files. Parameters
    keep the dtype in which they were partitioned.
    """
    check_fit(module, source, prefix=prefix, skip=skip, allow_unused=allow_unused)
    names = _parameter_names(module, prefix, skip)
    failure: Exception | None = None
    for name, source_name in names.items():
        parameter = module.get_parameter(name)
        if _is_partitioned(parameter):
            failure = _fill_partitioned(parameter, source, source_name) or failure
        else:
            _fill(module, name, source.tensor(source_name), dtype, device)
    if any(_is_partitioned(parameter) for parameter in module.parameters()):
        dist.raise_together(failure)


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


def _fill_partitioned(parameter: nn.Parameter, source: TensorSource, name: str) -> Exception | None:
    """Fill one gathered parameter. Returns a read error instead of raising it: the other ranks wait in the gather."""
    with gathered([parameter]):
        if dist.rank() != 0:
            return None
        try:
            copy_into(parameter, source.tensor(name))
        except Exception as error:  # the caller raises it on all ranks, which would otherwise hang
            return error if isinstance(error, ArcError) else WeightsError(str(error))
    return None


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _full_shape(parameter: nn.Parameter) -> Shape:
    """Shape of the whole parameter (a ZeRO-3 partition looks empty)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
