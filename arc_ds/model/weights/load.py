"""From files into a module's parameters, one tensor at a time, partitioned parameters (ZeRO-3) included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from arc_ds.errors import WeightsError
from arc_ds.model.weights.names import Shape

NamePredicate = Callable[[str], bool]


class TensorSource(Protocol):
    """Tensors by internal name: a backbone's files, or an ARC checkpoint."""

    @property
    def path(self) -> Path:
        """Where they come from, for messages."""

    def names(self) -> tuple[str, ...]:
        """All names."""

    def shape(self, name: str) -> Shape:
        """Shape, without reading."""

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU."""


def no_name(name: str) -> bool:
    """The predicate of no name."""
    del name
    return False


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
    """Copy tensors into the parameters of `module` by name, one tensor at a time.

    prefix, skip, allow_unused: as in `check_fit`, which is done first.
    dtype: the dtype that the parameters end in; None keeps each parameter's own. device: where parameters on the meta
        device are made, which loaded ones replace; default the CPU.
    Under ZeRO-3 every rank calls this; parameters are gathered one at a time and rank 0 alone reads. Their dtype was
    settled when they were partitioned.
    """
    check_fit(module, source, prefix=prefix, skip=skip, allow_unused=allow_unused)
    wanted = _wanted(module, prefix, skip)
    failure: Exception | None = None
    for name, source_name in wanted.items():
        parameter = module.get_parameter(name)
        if _is_partitioned(parameter):
            failure = _fill_partitioned(parameter, source, source_name) or failure
        else:
            _fill(module, name, source.tensor(source_name), dtype, device)
    if any(_is_partitioned(parameter) for parameter in module.parameters()):
        _raise_everywhere(failure)


def check_fit(
    module: nn.Module,
    source: TensorSource,
    *,
    prefix: str = "",
    skip: NamePredicate = no_name,
    allow_unused: NamePredicate = no_name,
) -> None:
    """Whether `load_backbone` could fill the module; reads names and shapes only, and the module may be on "meta".

    prefix: only parameters whose names begin with it are filled; what follows it is the name in the source.
    skip: names (after the prefix) of parameters that keep their values, such as an encoder's memory tokens.
    allow_unused: names in the source that no parameter need take, such as `names.beyond_layers(n)` for an encoder.
    WeightsError that lists parameters without a tensor or of another shape, and tensors left over.
    """
    available = frozenset(source.names())
    wanted = {short: module.get_parameter(name) for name, short in _wanted(module, prefix, skip).items()}
    faults = []
    for name, parameter in wanted.items():
        expected = _full_shape(parameter)
        if name not in available:
            faults.append(f"`{name}` is missing, expected {list(expected)}")
        elif source.shape(name) != expected:
            faults.append(f"`{name}` is {list(source.shape(name))}, expected {list(expected)}")
    faults += [f"`{n}` has no place in the model" for n in sorted(available - wanted.keys()) if not allow_unused(n)]
    if faults:
        raise WeightsError(
            f"{source.path} does not fit the model: {'; '.join(faults[:8])}"
            f"{f'; and {len(faults) - 8} more' if len(faults) > 8 else ''}. "
            "Check that the model was built from the sizes of these weights."
        )


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give one parameter its values, wherever it is: on "meta" (replaced), partitioned (rank 0's values), or whole."""
    parameter = module.get_parameter(name)
    if parameter.is_meta:
        _fill(module, name, tensor, None, None)
        return
    with gathered([parameter]):
        copy_into(parameter, tensor)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters whole while it lasts, also those that ZeRO-3 has partitioned; changes by rank 0 are kept everywhere.

    A collective where one of them is partitioned.
    """
    partitioned = [parameter for parameter in parameters if _is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy values, casting to the parameter's dtype. ValueError where the shapes differ (copy_ would broadcast)."""
    if parameter.shape != tensor.shape:
        raise ValueError(f"parameter {list(parameter.shape)} cannot take a tensor {list(tensor.shape)}")
    with torch.no_grad():
        parameter.copy_(tensor)


def _wanted(module: nn.Module, prefix: str, skip: NamePredicate) -> dict[str, str]:
    """Names of the parameters to fill, and what each is called in the source."""
    names = [name for name, _ in module.named_parameters() if name.startswith(prefix)]
    return {name: name[len(prefix) :] for name in names if not skip(name[len(prefix) :])}


def _fill(
    module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    parameter = module.get_parameter(name)
    target = dtype or parameter.dtype
    if parameter.is_meta:
        # A copy, because a tensor of a mapped file would keep the file open and change with it.
        values = tensor.to(device=device or "cpu", dtype=target, copy=True).contiguous()
        _replace(module, parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))
        return
    if parameter.dtype != target:
        parameter.data = parameter.data.to(target)
    copy_into(parameter, tensor)


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` wherever `old` stands: a tied head shares the embedding's parameter."""
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(owner, leaf, new)


def _fill_partitioned(parameter: nn.Parameter, source: TensorSource, name: str) -> Exception | None:
    """Fill one gathered parameter; a failure to read is returned, since the other ranks wait in the gather."""
    import torch.distributed as torch_dist

    with gathered([parameter]):
        if torch_dist.get_rank() != 0:
            return None
        try:
            copy_into(parameter, source.tensor(name))
        except Exception as error:  # raised on all ranks by the caller: the others would wait for ever
            return error
    return None


def _raise_everywhere(failure: Exception | None) -> None:
    """Rank 0's failure as a WeightsError on every rank."""
    import torch.distributed as torch_dist

    message: list[Any] = [None if failure is None else str(failure)]
    torch_dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise WeightsError(message[0]) from failure


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _full_shape(parameter: nn.Parameter) -> Shape:
    """The whole parameter's shape (a ZeRO-3 partition looks empty)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
