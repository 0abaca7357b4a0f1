"""Open and load decoders with `transformers`, which is imported only here, and only if a decoder needs it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arc_ds.errors import WeightsError, words_of
from arc_ds.model.frozen_decoder import TransformersSizes
from arc_ds.model.linear import FrozenLinear
from arc_ds.model.transformers_decoder import TransformersDecoder, find_reading, layers_of
from arc_ds.model.weights import gathered
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.load import copy_into
from arc_ds.model.weights.locate import locate
from arc_ds.model.weights.names import join_faults
from arc_ds.system import dist

logger = logging.getLogger(__name__)

_MAX_UNUSED_ROWS = 8  # OPT leaves two rows of its positions unused


@dataclass(frozen=True, kw_only=True)
class TransformersFiles:
    """The opened files of a decoder that `transformers` computes. No tensor is read before `load`.

    path: the folder.
    config: its config, of a class of transformers.
    sizes: its sizes.
    files: files with tensors.
    trust_remote_code: whether the Python files of the folder may run.
    activation_checkpointing: whether backward recomputes the layers.
    """

    path: Path
    config: Any
    sizes: TransformersSizes
    files: tuple[Path, ...]
    trust_remote_code: bool
    activation_checkpointing: bool

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return self.sizes.num_parameters

    def load(
        self, device: torch.device, dtype: torch.dtype, within: AbstractContextManager[Any] | None = None
    ) -> TransformersDecoder:
        """Load the decoder, frozen, and test how it reads batches.

        within: `engine.partitioned`, which makes this a collective: rank 0 alone reads the files, into its host's
            memory, and each rank keeps its shards. By default the decoder is whole on the device.

        Raises WeightsError if a tensor is missing, has the wrong shape or no place in the model, or a file is damaged.
        """
        if within is None:
            decoder = self._read(dtype, device)
            if device.type == "cpu":  # tensors of a memory-mapped file would change with it
                for tensor in itertools.chain(decoder.parameters(), decoder.buffers()):
                    tensor.data = tensor.data.clone()
        else:
            with dist.fail_together():
                whole = self._read(dtype, torch.device("cpu")) if dist.is_main() else None
            from transformers.initialization import no_init_weights

            with no_init_weights(), within:  # partitions have no shape to initialize
                model = _new_model(self.config, self.trust_remote_code)
            model.tie_weights()
            _distribute(whole, model, device)
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.__class__ = FrozenLinear
            decoder = self._decoder(model)
            decoder.reading = dist.broadcast_object(None if whole is None else whole.reading)
        return decoder

    def load_embedding(self, device: torch.device, dtype: torch.dtype) -> TransformersDecoder:
        """The whole decoder: transformers reads no parts of a model."""
        return self.load(device, dtype)

    def _read(self, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
        """The whole decoder, with the way in which it reads batches."""
        decoder = self._decoder(_read_model(self, dtype).to(device))
        with _as_weights_error(f"transformers cannot run {self.path} on short texts"):
            decoder.reading = reading = find_reading(decoder)
        how = "packed" if reading.is_packed else "padded"
        logger.info(f"decoder {self.path} reads {how} batches through transformers: {reading.reason}")
        return decoder

    def _decoder(self, model: nn.Module) -> TransformersDecoder:
        return TransformersDecoder(model, self.sizes, activation_checkpointing=self.activation_checkpointing)


def open_with_transformers(
    path: Path, *, trust_remote_code: bool = False, activation_checkpointing: bool = False
) -> TransformersFiles:
    """Open a Hugging Face folder for `transformers`. Reads its config only.

    Raises WeightsError if transformers is not installed or has no causal language model for the folder, if the folder
    needs code of its own that is not trusted, or if its weights are missing, quantised or an adapter.
    """
    fields = Fields.read(path / "config.json") if (path / "config.json").is_file() else None
    if fields is None:
        raise WeightsError(f"{path} has no config.json; transformers reads folders with one. Use such a folder.")
    fields.refuse_quantisation()
    if (path / "adapter_config.json").is_file():
        raise WeightsError(f"{path} holds an adapter; expected a whole model. Merge the adapter into its model first.")
    config = _read_config(path, fields, trust_remote_code)
    with _as_weights_error(f"transformers cannot build the model of {path}"), torch.device("meta"):
        model = _new_model(config, trust_remote_code)
    return TransformersFiles(
        path=path,
        config=config,
        sizes=_sizes(model, config),
        files=_weight_files(path),
        trust_remote_code=trust_remote_code,
        activation_checkpointing=activation_checkpointing,
    )


def _read_config(path: Path, fields: Fields, trust_remote_code: bool) -> Any:
    transformers = _import_transformers()
    seen = f"`model_type` is {fields.get('model_type')!r} and `architectures` is {fields.get('architectures')!r}"
    own_code = fields.get("auto_map")
    remedy = "Use another decoder, or a newer transformers (pip install --upgrade transformers)."
    if own_code and not trust_remote_code:
        remedy = (
            f"The folder brings code of its own ({_named(own_code)}), which is not run unless you trust it. Read it, "
            "then set decoders[].trust_remote_code: true in the run's config (--trust-remote-code on the command line, "
            "trust_remote_code=True in Python)."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # ValueError, KeyError, ImportError, OSError, or any error of the folder's code
        raise WeightsError(
            f"{fields.where}: {seen}; transformers {transformers.__version__} cannot read it. {remedy}"
        ) from error
    is_known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    has_own = trust_remote_code and isinstance(own_code, Mapping) and "AutoModelForCausalLM" in own_code
    if not is_known and not has_own:
        raise WeightsError(
            f"{fields.where}: {seen}; transformers {transformers.__version__} has no causal language model for it. "
            f"{remedy}"
        )
    return config


def _named(own_code: object) -> str:
    values = own_code.values() if isinstance(own_code, Mapping) else [own_code]
    return ", ".join(sorted({f"{str(value).split('.')[0]}.py" for value in values}))


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files, else the pickles, which are read with `weights_only`."""
    files = locate(path).files or tuple(sorted(path.glob("pytorch_model*.bin")))
    if not files:
        raise WeightsError(
            f"{path} holds a config.json but no weights; expected .safetensors files or pytorch_model.bin. Copy them."
        )
    return files


def _new_model(config: Any, trust_remote_code: bool) -> Any:
    """A model without weights, in the place that the caller's context chooses."""
    return _import_transformers().AutoModelForCausalLM.from_config(
        copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=torch.get_default_dtype()
    )


def _read_model(files: TransformersFiles, dtype: torch.dtype) -> Any:
    """The whole model on the CPU."""
    # A progress bar for each rank would mix with the log.
    with _without_progress_bars(), _as_weights_error(f"transformers cannot load {files.path}"):
        model, report = _import_transformers().AutoModelForCausalLM.from_pretrained(
            files.path,
            config=copy.deepcopy(files.config),
            dtype=dtype,
            trust_remote_code=files.trust_remote_code,
            local_files_only=True,
            use_safetensors=files.files[0].suffix == ".safetensors",
            weights_only=True,
            output_loading_info=True,
        )
    faults = [f"`{name}` is missing" for name in sorted(report["missing_keys"])]
    faults += [f"`{name}` has no place in the model" for name in sorted(report["unexpected_keys"])]
    faults += [*map(str, report["mismatched_keys"]), *map(str, report["error_msgs"])]
    if faults:
        expected, named = type(model).__name__, files.config.architectures or [type(model).__name__]
        remedy = "Copy the weights and config.json again from one source."
        if expected not in named:
            remedy = f"The folder holds a {named[0]}, but a decoder is a {expected}. Use the causal language model."
        raise WeightsError(
            f"{files.path} does not fit the model that transformers builds from its config: {join_faults(faults)}. "
            f"{remedy}"
        )
    return model


def _distribute(whole: TransformersDecoder | None, model: nn.Module, device: torch.device) -> None:
    """Copy rank 0's parameters into the partitions of all ranks, one at a time, and its buffers. Collective.

    Buffers are not partitioned. Under ZeRO-3's context they were made in the dtype of the parameters.
    """
    source = None if whole is None else whole.model
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            if source is not None:
                copy_into(parameter, source.get_parameter(name))
    buffers = dist.broadcast_object(None if source is None else dict(source.named_buffers()))
    for name, values in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, values.to(device))


def _sizes(model: Any, config: Any) -> TransformersSizes:
    text = config.get_text_config()
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    num_layers = getattr(text, "num_hidden_layers", 0)
    num_heads = getattr(text, "num_attention_heads", None) or 0
    head_dim = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // num_heads if num_heads else 0)
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    return TransformersSizes(
        model_type=str(config.model_type),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(parameter.numel() for layer in layers_of(model) for parameter in layer.parameters()),
        attention_size=num_layers * num_heads * head_dim,
        max_positions=_max_positions(model, text),
        cache_row_values=2 * num_layers * num_kv_heads * head_dim,
        config_digest=hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest(),
    )


def _max_positions(model: Any, text: Any) -> int | None:
    """The longest sequence whose logits do not depend on other sequences; None if there is no limit.

    A table of positions ends, perhaps with some unused rows. With the rotary scalings `dynamic` and `longrope`,
    transformers rotates all sequences of a batch as the longest one needs.
    """
    stated = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for scaling in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            return scaling.get("original_max_position_embeddings", stated)
    tables = [table for table in model.modules() if isinstance(table, nn.Embedding)]
    sizes = [table.num_embeddings for table in tables if table is not model.get_input_embeddings()]
    return stated if stated is not None and any(0 <= size - stated <= _MAX_UNUSED_ROWS for size in sizes) else None


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise WeightsError(
            "this decoder needs the package transformers, which is not installed. Install it with: "
            'pip install "arc-ds[transformers]"'
        ) from error
    return transformers


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as settings

    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()


@contextmanager
def _as_weights_error(what: str) -> Iterator[None]:
    """Raise errors of transformers and of the files that it reads as WeightsError."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{what}: {words_of(error)}. Check that the folder is complete, and that this transformers reads it."
        ) from error
