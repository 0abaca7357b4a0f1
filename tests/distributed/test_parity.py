"""Two ranks of ZeRO-3 against plain PyTorch on the joined batch, and wrong trainers that must fail.

The metrics are maxima over ten steps: the relative difference of losses and of gradient norms, and for parameters the
norm of the difference divided by the norm of the plain trainer's tensor. With DeepSpeed 0.19.8 and torch 2.13 they are
1.3e-7, 6.7e-7 and 3.3e-7 (the last with the eps of `plain_trainer`). Trained tensors move by 2e-3 to 2e-2 in these ten
steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from arc_ds.batch.packing import PackedBatch
from arc_ds.model import backbone
from arc_ds.model.backbone import Recompute
from arc_ds.model.compressor import Compressor, connect_adapters
from arc_ds.model.linear import Linear, Recomputed
from arc_ds.model.spec import LoraSpec
from arc_ds.model.weights import set_parameter
from arc_ds.training.engine import (
    PlacedDecoder,
    build_engine,
    partitioned,
    place_decoder,
    set_trained,
)
from arc_ds.training.frozen_guard import frozen_digest
from arc_ds.training.loss import Normalize
from arc_ds.training.optim import PortAdamW
from arc_ds.training.step import FrozenDecoder, StepResult, train_step
from tests.helpers.distributed import run_on_ranks
from tests.helpers.plain_trainer import (
    BETAS,
    EPS,
    MAX_GRAD_NORM,
    NUM_STEPS,
    SCHEDULE,
    TASKS,
    Trajectory,
    bare_compressor,
    bare_decoders,
    plain_loss,
    step_of_rank,
    tiny_compressor,
    tiny_decoders,
    tiny_ds_config,
    tiny_groups,
    train_plainly,
)

NUM_PARTS = 2
SPOILT_STEP = 5
TOLERANCE = 1e-6
# The models amplify rounding on some samples. In float32 the gradient of the worst step (`ROUGH_STEP`, decoder 0)
# differs from that in float64 by this share of its norm. A norm may err as much, and the difference of two independent
# runs has sqrt(2) times the deviation.
ROUGH_STEP = 5
ROUNDING = 3.7e-6
NORM_TOLERANCE = 2**0.5 * ROUNDING


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training set-up: the recommended one, or one with a single mistake.

    born_partitioned: build modules partitioned, as in a run, so no rank ever holds a whole model.
    same_batch: each step trains for both decoders.
    shared_bridge: the decoders have one bridge.
    max_encoder_tokens: limit of a micro-batch; ranks split their two parts to satisfy it.
    spoilt: the quantity that is not finite on rank 1 in step `SPOILT_STEP`; None for none.
    parts: differences of the backbones from Llama, by name (`plain_trainer.PARTS`).
    num_parts: planned micro-batches of each rank.
    lora: adapters of the encoder.
    decoder_lora: adapters of each decoder.
    mistake: a name in `_MISTAKES`.
    zero: further keys of zero_optimization, of all engines.
    validates: every third step is followed by a forward pass of each decoder without gradients.
    """

    placement: str = "replicated"
    born_partitioned: bool = False
    activation_checkpointing: Recompute = "none"
    trained_layers: int | None = None
    train_embeddings: bool = True
    persistence_threshold: int = 100
    normalize: Normalize = "global"
    same_batch: bool = False
    shared_bridge: bool = False
    max_encoder_tokens: int | None = None
    spoilt: Literal["loss", "gradient"] | None = None
    parts: str = "llama"
    num_decoders: int = 2
    num_parts: int = NUM_PARTS
    lora: LoraSpec | None = None
    decoder_lora: LoraSpec | None = None
    mistake: str | None = None
    zero: Mapping[str, Any] = field(default_factory=dict)
    validates: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """Results of a run on one rank.

    frozen: digests of this rank's part of each decoder, before and after the run (`frozen_digest`).

    traced: whether ZeRO-3 has recorded the module order and therefore prefetches parameters. It records the order in
        the second pass and discards it permanently if a later pass differs.
    """

    trajectory: Trajectory
    results: tuple[StepResult, ...]
    traced: bool
    state_kept: bool
    num_passes: tuple[int, ...]
    frozen: tuple[list[int], list[int]] = ([], [])


def _ds_config(case: Case) -> dict[str, Any]:
    zero = {
        "reduce_bucket_size": 3000,
        "stage3_prefetch_bucket_size": 5000,
        "stage3_param_persistence_threshold": case.persistence_threshold,
        **case.zero,
    }
    return tiny_ds_config(num_parts=case.num_parts, **zero) | {"gradient_clipping": MAX_GRAD_NORM}


def _kind(case: Case) -> dict[str, Any]:
    names = ("activation_checkpointing", "shared_bridge", "parts", "num_decoders")
    return {name: getattr(case, name) for name in names}


def _lora(case: Case) -> dict[str, Any]:
    return {"lora": case.lora, "decoder_lora": case.decoder_lora}


def _trained(case: Case) -> dict[str, Any]:
    rank = 0 if case.lora is None else case.lora.rank
    return {"trained_layers": case.trained_layers, "train_embeddings": case.train_embeddings, "lora_rank": rank}


def _place(case: Case) -> list[PlacedDecoder]:
    config = _ds_config(case)
    del config["gradient_clipping"]
    config["zero_optimization"].pop("offload_optimizer", None)
    if case.placement == "zero3+hpz":
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
    decoders = tiny_decoders(**_kind(case))
    if case.born_partitioned and case.placement != "replicated":
        with partitioned(config):
            born = bare_decoders(**_kind(case))
        for decoder, whole in zip(born, decoders, strict=True):
            _give_values(decoder, whole)
        decoders = born
    return [place_decoder(decoder, None if case.placement == "replicated" else config) for decoder in decoders]


def _give_values(module: nn.Module, whole: nn.Module) -> None:
    for name, parameter in whole.named_parameters():
        set_parameter(module, name, parameter.detach())


def _build(case: Case) -> Any:
    compressor = tiny_compressor(**_trained(case), **_kind(case), **_lora(case))
    if case.born_partitioned:
        whole = compressor
        with partitioned(_ds_config(case)):
            compressor = bare_compressor(**_kind(case), **_lora(case))
        _give_values(compressor, whole)
        set_trained(compressor.encoder, **_trained(case))
    return build_engine(compressor, PortAdamW(tiny_groups(compressor), betas=BETAS, eps=EPS), _ds_config(case))


def _train(case: Case) -> Run:
    """Run all steps on this rank."""
    with nullcontext() if case.mistake is None else mock.patch(*_MISTAKES[case.mistake]):
        return _train_engine(case, _build(case), _place(case))


_prepare = PortAdamW.prepare


def _prepare_all_groups(optimizer: PortAdamW, *args: Any) -> dict[str, float]:
    rates = _prepare(optimizer, *args)
    for group in optimizer.param_groups:
        group["active"] = True
    return rates


def _without_idle_ports(compressor: Compressor, batch: PackedBatch, decoder_idx: int = 0) -> Tensor:
    return compressor.ports[decoder_idx](compressor.encoder(batch), batch)


def _detached(layer: torch.nn.Module, stream: backbone.Stream, *args: Any, **kwargs: Any) -> backbone.Stream:
    return backbone.run_layer(layer, backbone.Stream(stream.total_TD.detach().requires_grad_()), *args, **kwargs)


def _without_norms(block: backbone.Block, norm: Any, x_TD: Tensor) -> Recomputed:
    return Recomputed(norm or (lambda x: x), (x_TD,))


# Replaced functions and their replacements.
_MISTAKES: dict[str, tuple[str, Any]] = {
    "ports at rest are updated": ("arc_ds.training.optim.PortAdamW.prepare", _prepare_all_groups),
    "ports at rest are not in the graph": ("arc_ds.model.compressor.Compressor.forward", _without_idle_ports),
    "the input of recomputed layers gets no gradient": ("arc_ds.model.encoder.run_layer", _detached),
    "the norms of recomputed rows get no gradient": ("arc_ds.model.backbone.Block._recomputed", _without_norms),
}


def _train_engine(case: Case, engine: Any, decoders: list[PlacedDecoder]) -> Run:
    connect_adapters(engine.module.ports, [decoder.module for decoder in decoders])
    before = [frozen_digest(decoder.module) for decoder in decoders]
    results: list[StepResult] = []
    num_passes: list[int] = []
    state_kept = True
    for step in range(NUM_STEPS):
        batch = step_of_rank(
            step,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            num_parts=case.num_parts,
            same_batch=case.same_batch,
            num_decoders=case.num_decoders,
            max_encoder_tokens=case.max_encoder_tokens,
        )
        num_passes.append(len(batch.micro_batches))
        used: list[FrozenDecoder] = list(decoders)
        spoilt = case.spoilt is not None and step == SPOILT_STEP
        state = _state(engine) if spoilt else {}
        if spoilt and dist.get_rank() == 1:
            used = [functools.partial(_SPOILERS[case.spoilt], decoder) for decoder in decoders]
        results.append(train_step(engine, used, batch, schedule=SCHEDULE, tasks=TASKS, normalize=case.normalize))
        if spoilt:
            after = _state(engine)
            state_kept = state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)
        if case.validates and step % 3 == 2:
            with torch.no_grad():
                for idx, decoder in enumerate(decoders):
                    held_out = step_of_rank(
                        100 + step,
                        rank=dist.get_rank(),
                        world_size=dist.get_world_size(),
                        num_parts=1,
                        num_decoders=idx + 1,
                    )
                    batch = held_out.micro_batches[0].batch
                    decoder(batch, engine(batch, idx))
    trajectory = Trajectory(
        losses=tuple(float(result.loss) for result in results),
        grad_norms=tuple(float(result.grad_norm) for result in results),
        params=_full_params(engine),
    )
    return Run(
        trajectory=trajectory,
        results=tuple(results),
        traced=engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace(),
        state_kept=state_kept,
        num_passes=tuple(num_passes),
        frozen=(before, [frozen_digest(decoder.module) for decoder in decoders]),
    )


def _infinite_nll(decoder: Callable[[PackedBatch, Tensor], Tensor], batch: PackedBatch, z_ZD: Tensor) -> Tensor:
    """An infinite loss with a finite gradient: only the loss shows the problem."""
    return decoder(batch, z_ZD) + torch.inf


def _nan_gradient(decoder: Callable[[PackedBatch, Tensor], Tensor], batch: PackedBatch, z_ZD: Tensor) -> Tensor:
    """A finite loss with one NaN gradient: only the gradient shows the problem."""
    z_ZD.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), torch.nan))
    return decoder(batch, z_ZD)


_SPOILERS = {"loss": _infinite_nll, "gradient": _nan_gradient}


def _state(engine: Any) -> dict[str, Tensor]:
    """This rank's master weights, moments and step counts."""
    zero = engine.optimizer
    found = {}
    for idx, flat in enumerate(zero.fp32_partitioned_groups_flat):
        found[f"{idx}.weights"] = flat.detach().clone()
        for key, value in zero.optimizer.state[flat].items():
            found[f"{idx}.{key}"] = value.clone()
    return found


def _full_params(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


@functools.cache
def _plain(*, without: int | None = None, same_batch: bool = False, mean_of_parts: int = 1, **model: Any) -> Trajectory:
    """Run of the plain trainer. without: a step to skip. model: see `tiny_compressor`."""
    of_decoders = ("shared_bridge", "parts", "num_decoders")
    decoders = tiny_decoders(**{name: model[name] for name in of_decoders if name in model})
    steps = [step for step in range(NUM_STEPS) if step != without]
    return train_plainly(tiny_compressor(**model), decoders, steps, same_batch=same_batch, mean_of_parts=mean_of_parts)


def _assert_close(errors: dict[str, float]) -> None:
    assert max(errors["losses"], errors["params"]) < TOLERANCE and errors["grad_norms"] < NORM_TOLERANCE, errors


def _worst(found: Iterable[float], wanted: Iterable[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def _errors(found: Trajectory, wanted: Trajectory) -> dict[str, float]:
    """Worst relative errors of losses, norms and parameters."""
    params = [float((found.params[name] - value).norm() / value.norm()) for name, value in wanted.params.items()]
    return {
        "losses": _worst(found.losses, wanted.losses),
        "grad_norms": _worst(found.grad_norms, wanted.grad_norms),
        "params": max(params),
    }


# `test_parity_matrix.py` has the placements of modules that are born partitioned.
RIGHT = {
    "replicated": Case(),
    "replicated, recomputed": Case(activation_checkpointing="full", zero={"sub_group_size": 700}),
    "partitioned": Case(placement="zero3", zero={"sub_group_size": 700}),
    "encoder born partitioned, and frozen but its last layer": Case(
        placement="zero3", born_partitioned=True, trained_layers=1, train_embeddings=False
    ),
    "both decoders on one batch": Case(same_batch=True),
    "both decoders on one batch, partitioned, split": Case(
        same_batch=True, placement="zero3", born_partitioned=True, persistence_threshold=0, max_encoder_tokens=14
    ),
    "shared bridge, born partitioned": Case(
        shared_bridge=True, placement="zero3", born_partitioned=True, persistence_threshold=0
    ),
    "shared bridge, both decoders on one batch": Case(shared_bridge=True, same_batch=True),
    "split under a limit": Case(max_encoder_tokens=14),
    "biases, norms of queries and keys, windows": Case(
        placement="zero3",
        born_partitioned=True,
        activation_checkpointing="full",
        persistence_threshold=0,
        parts="qwen",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_two_ranks_equal_plain_pytorch(name: str) -> None:
    case = RIGHT[name]
    wanted = _plain(**_trained(case), same_batch=case.same_batch, shared_bridge=case.shared_bridge, parts=case.parts)
    runs = run_on_ranks(_train, case)
    _assert_close(_errors(runs[0].trajectory, wanted))
    assert min(wanted.grad_norms) > MAX_GRAD_NORM, "clipping was not active"
    assert runs[0].traced
    _assert_both_ranks_agree(runs)
    _assert_moved(case, runs[0].trajectory)


def _assert_both_ranks_agree(runs: list[Run]) -> None:
    for first, second in zip(runs[0].results, runs[1].results, strict=True):
        assert torch.equal(first.nll_DK, second.nll_DK) and torch.equal(first.labels_DK, second.labels_DK)
        assert torch.equal(first.grad_norm, second.grad_norm)
        assert first.applied and second.applied and first.notices == second.notices
        assert {f"markers.{idx}" for idx in first.decoder_idxs} <= first.learning_rates.keys()
        own_bridges = {f"bridge.{idx}" for idx in first.decoder_idxs}
        bridges = {name for name in first.learning_rates if name.startswith("bridge")}
        assert bridges in ({"bridge"}, own_bridges)
        adapters = {name for name in first.learning_rates if name.startswith("adapters")}
        assert adapters in (set(), {f"adapters.{idx}" for idx in first.decoder_idxs})
        others = len(first.learning_rates) - ("encoder" in first.learning_rates) - len(adapters)
        assert others == len(bridges) + len(own_bridges)


def _assert_moved(case: Case, trajectory: Trajectory) -> None:
    """Every trained tensor has moved by more than the tolerance; no other tensor has moved."""
    start = tiny_compressor(**_trained(case), **_kind(case), **_lora(case))
    for name, param in start.named_parameters():
        distance = float((trajectory.params[name] - param).norm() / param.norm())
        assert distance > 1e3 * TOLERANCE if param.requires_grad else distance == 0, (name, distance)


@pytest.mark.parametrize("max_encoder_tokens", [None, 14], ids=["whole", "split"])
@pytest.mark.parametrize("same_batch", [False, True], ids=["one decoder", "both decoders"])
def test_rank_means_are_the_mean_of_all_parts_means_however_they_are_split(
    same_batch: bool, max_encoder_tokens: int | None
) -> None:
    case = Case(normalize="rank_mean", same_batch=same_batch, max_encoder_tokens=max_encoder_tokens)
    found = run_on_ranks(_train, case)[0].trajectory
    _assert_close(_errors(found, _plain(same_batch=same_batch, mean_of_parts=2 * NUM_PARTS)))
    errors = _errors(found, _plain(same_batch=same_batch))
    assert errors["grad_norms"] > 1e3 * TOLERANCE and errors["params"] > 1e3 * TOLERANCE, errors


def test_a_split_is_one_and_alone_a_rank_makes_the_same_of_it() -> None:
    """Some steps have more passes than parts, in equal number on both ranks. A single rank gives the same results."""
    case = Case(max_encoder_tokens=14)
    runs = run_on_ranks(_train, case)
    assert runs[0].num_passes == runs[1].num_passes and len({*runs[0].num_passes, NUM_PARTS}) > 2
    alone = run_on_ranks(_train, case, num_ranks=1)[0]
    _assert_close(_errors(alone.trajectory, runs[0].trajectory))


def test_a_port_at_rest_that_is_stepped_moves() -> None:
    errors = _errors(run_on_ranks(_train, Case(mistake="ports at rest are updated"))[0].trajectory, _plain())
    assert errors["losses"] > 1e2 * TOLERANCE and errors["params"] > 1e3 * TOLERANCE, errors


def test_a_port_left_out_of_the_graph_spoils_the_gradient_norm() -> None:
    errors = _errors(run_on_ranks(_train, Case(mistake="ports at rest are not in the graph"))[0].trajectory, _plain())
    assert errors["grad_norms"] > 1e3 * TOLERANCE and errors["params"] > 1e2 * TOLERANCE, errors


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(spoilt: Literal["loss", "gradient"]) -> None:
    runs = run_on_ranks(_train, Case(spoilt=spoilt))
    for run in runs:
        assert [result.step for result in run.results if not result.applied] == [SPOILT_STEP]
        assert run.state_kept
    found = runs[0].trajectory
    assert torch.tensor(found.losses[SPOILT_STEP]).isfinite() == (spoilt == "gradient")
    assert torch.tensor(found.grad_norms[SPOILT_STEP]).isinf()
    found = _without(found, SPOILT_STEP)
    _assert_close(_errors(found, _plain(without=SPOILT_STEP)))
    errors = _errors(found, _without(_plain(), SPOILT_STEP))  # a trainer that applies the step
    assert min(errors["losses"], errors["grad_norms"], errors["params"]) > 1e2 * NORM_TOLERANCE, errors


def test_the_bound_of_gradient_norms_is_the_rounding_of_float32() -> None:
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        compressor = tiny_compressor(num_decoders=1).to(dtype)
        decoders = [decoder.to(dtype) for decoder in tiny_decoders(num_decoders=1)]
        _, loss = plain_loss(compressor, decoders, ROUGH_STEP)
        loss.backward()
        grads = [param.grad.flatten() for param in compressor.parameters() if param.grad is not None]
        gradients[dtype] = torch.cat(grads).double()
    exact = gradients[torch.float64]
    error = (gradients[torch.float32] - exact).norm() / exact.norm()
    assert 0.5 * ROUNDING < error < 2 * ROUNDING  # the number of threads changes the order of sums


def _without(trajectory: Trajectory, step: int) -> Trajectory:
    losses, norms = trajectory.losses, trajectory.grad_norms
    return dataclasses.replace(
        trajectory, losses=losses[:step] + losses[step + 1 :], grad_norms=norms[:step] + norms[step + 1 :]
    )


def _weights_kept_for_backward(own_linear: bool) -> dict[str, int]:
    """Number of linears, of gathered weights saved in the graph, and of weights alive between forward and backward."""
    case = Case(placement="zero3", persistence_threshold=0)
    engine, decoders = _build(case), _place(case)
    batch = step_of_rank(0, rank=dist.get_rank(), world_size=2, num_parts=1).micro_batches[0].batch
    roots = (engine.module, decoders[0].module)
    weights = [module.weight for root in roots for module in root.modules() if isinstance(module, Linear)]
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        gathered = {weight.untyped_storage().data_ptr() for weight in weights if weight.numel()}
        saved += tensor.untyped_storage().data_ptr() in gathered
        return tensor

    def torchs_linear(self: Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    def torchs_joint(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
        return tuple(torchs_linear(linear, x) for linear in linears)

    with ExitStack() as stack:
        if not own_linear:
            stack.enter_context(mock.patch.object(Linear, "forward", torchs_linear))
            stack.enter_context(mock.patch.object(backbone, "joint_linear", torchs_joint))
        stack.enter_context(saved_tensors_hooks(count, lambda tensor: tensor))
        loss = decoders[0](batch, engine(batch, 0)).mean()
    alive = sum(weight.numel() > 0 for weight in weights)
    engine.backward(loss)
    return {"linears": len(weights), "saved": saved, "alive": alive}


def test_no_gathered_weight_outlives_its_module() -> None:
    ours = run_on_ranks(_weights_kept_for_backward, True)[0]
    assert ours["linears"] > 40 and ours["saved"] == ours["alive"] == 0, ours
    torchs = run_on_ranks(_weights_kept_for_backward, False)[0]
    assert torchs["saved"] > 30, torchs
