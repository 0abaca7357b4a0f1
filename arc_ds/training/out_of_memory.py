"""The message of a rank that has run out of memory: where it was, what holds the memory, and how to need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arc_ds.config.schema import RunConfig
from arc_ds.errors import OutOfMemoryError, words_of
from arc_ds.system import activity, dist
from arc_ds.system.device import GIB, peak_memory_bytes
from arc_ds.training.memory import engine_memory
from arc_ds.training.run import Run

# The CPU's allocator raises a plain RuntimeError.
_OF_CPU = "DefaultCPUAllocator: can't allocate memory"


@contextmanager
def explaining_memory(config: RunConfig, run: Run | None = None) -> Iterator[None]:
    """A block in which a lack of memory, on a GPU or on the host, raises OutOfMemoryError with an explanation.

    run: None before it is built.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        parts = "" if run is None else f" {_parts(run)}"
        load = f" ({activity.now.load})" if activity.now.load else ""
        raise OutOfMemoryError(
            f"{dist.rank_in_words()} ran out of memory at {activity.now}{load}: {words_of(error).rstrip('.')}.{parts} "
            f"To need less: {'; '.join(_remedies(config))}."
        ) from error


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _OF_CPU in str(error)


def _parts(run: Run) -> str:
    of_trained = engine_memory(run.engine.module, run.engine, run.device)
    of_frozen = [engine_memory(decoder.module, None, run.device) for decoder in run.decoders]
    parts = {
        "weights of the compressor": of_trained.parameters,
        "gradients": of_trained.gradients,
        "optimizer": of_trained.optimizer,
        "frozen decoders": sum(each.parameters for each in of_frozen),
        "gathered weights": sum(each.gathered for each in (of_trained, *of_frozen)),
    }
    peak = peak_memory_bytes(run.device)
    rest = max(peak - sum(parts.values()), 0)
    what = "activations" if run.device.type != "cpu" else "activations and programs"
    words = ", ".join(f"{name} {size / GIB:.2f}" for name, size in {**parts, what: rest}.items())
    return f"This rank holds, in GiB: {words} (peak {peak / GIB:.2f})."


def _remedies(config: RunConfig) -> Iterator[str]:
    """Settings that need less memory and that this run does not use yet, those without a cost first."""
    limits = [
        f"{name} ({'unlimited' if limit is None else f'now {limit}'})"
        for name, limit in (
            ("data.max_encoder_tokens", config.data.max_encoder_tokens),
            ("data.max_decoder_rows", config.data.max_decoder_rows),
        )
    ]
    yield f"lower {' or '.join(limits)}, or raise micro_batches (now {config.micro_batches})"
    decoders = config.trained_decoders
    recomputed = [f"decoders.{idx}" for idx, decoder in decoders.items() if decoder.activation_checkpointing != "full"]
    if config.encoder.activation_checkpointing != "full":
        recomputed.insert(0, "encoder")
    if recomputed:
        yield "set " + ", ".join(f"{name}.activation_checkpointing=full" for name in recomputed)
    whole = [idx for idx, decoder in decoders.items() if decoder.placement in ("auto", "replicated")]
    if whole and dist.world_size() > 1:
        yield "set " + ", ".join(f"decoders.{idx}.placement=zero3" for idx in whole)
    yield "offload the optimizer to the host (deepspeed=ds_configs/zero3_offload.json), or use more GPUs"
