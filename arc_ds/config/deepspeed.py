"""DeepSpeed's JSON, with its "auto" values filled in from the run's config. So each number has one owner."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from arc_ds.config.deepspeed_keys import check_keys, check_values
from arc_ds.config.load import flatten_tree
from arc_ds.config.schema import RunConfig
from arc_ds.config.validate import check_world_size
from arc_ds.errors import ConfigError
from arc_ds.system.user_files import read_user_json
from arc_ds.system.user_paths import user_path

_FOREIGN = ("optimizer", "scheduler", "fp16", "bfloat16", "amp", "torch_autocast", "monitor_config", "elasticity")
_HPZ = "zero_hpz_partition_size"
_QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def resolve_deepspeed(
    path: str | Path, config: RunConfig, world_size: int, local_world_size: int | None = None
) -> dict[str, Any]:
    """The dict for `deepspeed.initialize` of the trained model.

    The YAML owns batch sizes, clipping and bf16. The JSON may leave them out, say "auto", or agree. Imports DeepSpeed.

    path: the JSON file.
    config: the run's config.
    world_size: ranks of the run.
    local_world_size: ranks on this host (default `world_size`). It replaces `zero_hpz_partition_size: "auto"`.

    Raises ConfigError if a number disagrees, we cannot fill in an "auto", the stage is not 3, gradients are not summed
    in fp32, the JSON has its own optimizer or schedule, or DeepSpeed does not accept a key or a value. Raises
    ConfigError on options that no parity test covers: quantised communication (ZeRO++) and offload to NVMe.
    """
    name = str(path)
    check_keys(_read(path), name)
    resolved = fill_deepspeed(path, config, world_size, local_world_size)
    check_values(resolved, name)
    return resolved


def fill_deepspeed(
    path: str | Path, config: RunConfig, world_size: int, local_world_size: int | None = None
) -> dict[str, Any]:
    """`resolve_deepspeed` without DeepSpeed, and thus without its own checks of keys and values."""
    name, resolved = str(path), _with_home(_read(path))
    for section in _FOREIGN:
        if section in resolved:
            raise ConfigError(f"{name}: has a section {section!r}, which ARC-DS owns or does not use. Remove it.")
    _refuse_untested(resolved, name)
    owned = _owned_values(config, world_size)
    for key, value in owned.items():
        _fill(resolved, key, value, name)
    zero = resolved["zero_optimization"]
    if zero.get(_HPZ) == "auto":
        zero[_HPZ] = local_world_size or world_size
    autos = [key for key, value in flatten_tree(resolved).items() if value == "auto"]
    if autos:
        known = ", ".join((*owned, f"zero_optimization.{_HPZ}"))
        raise ConfigError(f'{name}: {", ".join(autos)} is "auto"; only these can be: {known}. Write a number there.')
    return resolved


def resolve_decoder_deepspeed(
    resolved: Mapping[str, Any], placement: Literal["zero3", "zero3+hpz"], local_world_size: int
) -> dict[str, Any]:
    """The dict for a frozen decoder's own ZeRO-3 engine: `resolved` without the optimizer's keys.

    "zero3+hpz" keeps a second copy of the shards within each host of `local_world_size` ranks. Gathers then stay within
    the host (ZeRO++, section 4.2).
    """
    decoder = copy.deepcopy(dict(resolved))
    decoder.pop("gradient_clipping", None)
    zero = decoder["zero_optimization"]
    zero.pop("offload_optimizer", None)
    zero[_HPZ] = local_world_size if placement == "zero3+hpz" else 1
    return decoder


def _owned_values(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Values that the YAML or ARC-DS owns, by dotted path in the JSON."""
    return {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": check_world_size(config, world_size),
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16.enabled": config.precision == "bf16",
        "data_types.grad_accum_dtype": "fp32",
        "zero_optimization.stage": 3,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # else offload_optimizer refuses our optimizer
    }


def _refuse_untested(resolved: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError on options of DeepSpeed whose results no test of ours compares with plain PyTorch."""
    zero = resolved.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return  # `_fill` says what is wrong
    for key in _QUANTISED:
        if zero.get(key):
            raise ConfigError(
                f"{name}: zero_optimization.{key} is not supported. It rounds what the ranks exchange to 8 or 4 bits, "
                "and its kernels need an NVIDIA GPU, so its effect on this training is untested. Remove it. To gather "
                'weights within each host instead, set zero_hpz_partition_size: "auto" '
                "(ds_configs/zero3_hpz.json) and decoders[].placement: zero3+hpz."
            )
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key)
        if isinstance(section, dict) and section.get("device") == "nvme":
            raise ConfigError(
                f"{name}: zero_optimization.{key}.device is nvme, which is not supported: checkpoints read weights and "
                f"moments from memory, and no test covers DeepSpeed's files. Set {key}.device: cpu "
                "(ds_configs/zero3_offload.json), use more GPUs, or train less of the encoder (encoder.lora, "
                "encoder.train)."
            )


def _fill(resolved: dict[str, Any], path: str, value: Any, name: str) -> None:
    *sections, key = path.split(".")
    section = resolved
    for part in sections:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{name}: {part} is {section!r}; expected an object with the key {key!r}")
    given = section.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(f'{name}: {path} is {given!r}, but the run says {value!r}. Write "auto" there.')
    section[key] = value


def _with_home(value: Any) -> Any:
    """The JSON with `~` replaced in its paths (`nvme_path`, `output_path`)."""
    if isinstance(value, dict):
        return {key: _with_home(child) for key, child in value.items()}
    return user_path(value) if isinstance(value, str) and value.startswith("~") else value


def _read(path: str | Path) -> dict[str, Any]:
    remedy = "Give a JSON file such as ds_configs/zero3.json as deepspeed=path."
    content = read_user_json(Path(path), ConfigError, remedy=remedy)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
