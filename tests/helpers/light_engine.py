"""A small object with the parts of DeepSpeed's ZeRO-3 engine that a save reads, for tests of files and folders."""

from __future__ import annotations

from types import SimpleNamespace

import torch


def light_engine(value: float = 1.0) -> SimpleNamespace:
    """An engine of one rank with one trained parameter, all of whose states are `value`."""
    parameter = _Parameter()
    master = torch.full(parameter.ds_shape, value).requires_grad_()
    adam = {"step": torch.tensor(value)} | {
        name: torch.full(parameter.ds_shape, value) for name in ("exp_avg", "exp_avg_sq")
    }
    optimizer = SimpleNamespace(
        fp16_groups=[[parameter]],
        fp32_partitioned_groups_flat=[master],
        optimizer=SimpleNamespace(state={master: adam}),
    )
    counters = {"global_steps": int(value), "global_samples": 0, "skipped_steps": 0}
    return SimpleNamespace(optimizer=optimizer, param_names={parameter: "encoder.weight"}, **counters)


class _Parameter:
    ds_shape = torch.Size([5000])
