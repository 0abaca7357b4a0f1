"""The configuration of a run: every number that a run owns, with its unit, range and the reason of its default.

The docstring under a field is its documentation. Defaults are the paper's pretraining (arXiv 2510.20535, appendix B;
design 13) unless a field says otherwise. Loading, overrides and the types that a value may have: `load.py` and
`decode.py`; what excludes what: `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from arc_ds.config.ranges import Count, NonNegativeFloat, Positive, PositiveFloat, Range
from arc_ds.errors import ConfigError

RopeScalingChoice = Literal["checkpoint", "none"]
# The names of `arc_ds.model.pooling.STRATEGIES`, which a config must not import; a test holds the two together.
PoolingStrategy = Literal[
    "mean", "last", "sum", "fusion",
    "kmeans", "kmeans_euclidean", "kmeans_cosine",
    "similarity", "similarity_dot", "similarity_cosine",
    "similarity_euclidean", "similarity_manhattan", "similarity_chebyshev",
    "prune", "prune_dot", "prune_cosine", "prune_euclidean", "prune_manhattan", "prune_chebyshev",
    "prune_norm",
]  # fmt: skip
ShareSchedule = tuple[tuple[int, float], ...]
Factor = Annotated[
    int, Range(at_least=1, cure="A factor is tokens per group: 1 keeps every token, 8 is the paper's.")
]
Decay = Annotated[float, Range(at_least=0, below=1)]
DEFAULT_TRUNCATED_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The text encoder: the first layers of a pretrained backbone, and which of them are trained."""

    backbone: str
    """Where the backbone's weights and sizes are: a Hugging Face folder, a Meta/Mistral folder, or a .gguf file."""
    tokenizer: str | None = None
    """Tokenizer file or folder. None: the one beside the backbone (or inside the .gguf)."""
    num_layers: Positive | None = None
    """How many of the backbone's layers to keep, from the first. Excludes `num_truncated_layers`."""
    num_truncated_layers: Count | None = None
    """How many of the backbone's last layers to drop. None: 2 (the paper's) unless `num_layers` is given."""
    rope_scaling: RopeScalingChoice = "checkpoint"
    """Rotary scaling: the checkpoint's own, or none. Weights released by the paper's authors were trained with none."""
    causal: bool = False
    """Whether a token sees only what precedes it. False: the whole context in both directions, as in the paper."""
    trained_layers: Annotated[int, Range(at_least=0, cure="0 freezes the encoder's layers.")] | None = None
    """How many of the last kept layers are trained. None: all; 0: the encoder is frozen (a new decoder's bridge)."""
    train_embeddings: bool = True
    """Whether the token embeddings are trained."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward instead of keeping it: less memory, one more forward of the encoder."""
    init_from: str | None = None
    """An ARC checkpoint to start encoder, markers and bridges from. None: the backbone's weights and fresh bridges."""

    def kept_layers(self, num_backbone_layers: int) -> int:
        """How many layers the encoder keeps of a backbone of `num_backbone_layers`.

        ConfigError where none would be left or more are asked for than there are.
        """
        key = "num_layers" if self.num_layers is not None else "num_truncated_layers"
        if self.num_layers is not None:
            kept = self.num_layers
        else:
            dropped = self.num_truncated_layers
            kept = num_backbone_layers - (DEFAULT_TRUNCATED_LAYERS if dropped is None else dropped)
        if not 1 <= kept <= num_backbone_layers:
            raise ConfigError(
                f"encoder.{key}: {kept} layers would be kept of the {num_backbone_layers} in {self.backbone}; "
                f"expected 1 to {num_backbone_layers}. Set encoder.num_layers to a number in that range."
            )
        return kept


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """How the tokens of a context become compressed tokens. One of factors, num_groups, memory_tokens is in force."""

    strategy: PoolingStrategy = "mean"
    """What a group becomes: mean (paper), last token, sum, mean rescaled to the group's largest norm (fusion). Or
    groups by content: means of k-means clusters, neighbours merged or pruned by similarity, rows of largest norm."""
    pooled_queries: bool = True
    """Pool residual stream and queries only, keys and values stay unpooled. Without effect where `where: between`."""
    where: Literal["before", "between"] = "before"
    """Pool the states that enter the layer, or those between its attention and its FFN."""
    factors: tuple[Factor, ...] = (8,)
    """Tokens per group, one factor for each of the last layers: [8] pools in the last, [2, 2] in the last two."""
    num_groups: Positive | None = None
    """A fixed number of groups for every context, in place of factors (then set `factors: []`)."""
    memory_tokens: Count = 0
    """Learned vectors appended to each context, whose outputs replace pooling (then set `factors: []`); 0: none."""


@dataclass(frozen=True, kw_only=True)
class MarkersConfig:
    """The learned vector after each context, in encoder width, one per task and decoder."""

    rec: bool = True
    """Whether contexts of reconstruction end with `<Rec>`."""
    cont: bool = True
    """Whether contexts of every other task end with `<Cont>`."""
    init: Literal["ones", "embedding"] = "ones"
    """Start as ones (paper), or as a token's embedding, whose norm fits a small model better (design 14)."""


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The map from encoder width to decoder width, one per decoder."""

    kind: Literal["mlp", "linear", "rms", "none"] = "mlp"
    """Two linears without bias or activation; one linear; RMSNorm and two linears; nothing (widths must be equal)."""
    hidden_size: Annotated[int, Range(at_least=1, cure="null takes the decoder's width.")] | None = 2048
    """Width between the two linears. None: the decoder's width. Without effect for `linear` and `none`."""
    init: Literal["kaiming", "identity"] = "kaiming"
    """Kaiming-uniform with a = √5 (paper), or the identity, a warm start where all widths are equal (design 14)."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One frozen decoder."""

    name: str
    """Its name in metrics and in `generate`; letters, digits, `_`, `-`, `.`; differs between decoders."""
    backbone: str
    """Where its weights and sizes are: a Hugging Face folder, a Meta/Mistral folder, or a .gguf file."""
    tokenizer: str | None = None
    """Tokenizer file or folder. None: the one beside the backbone (or inside the .gguf)."""
    rope_scaling: RopeScalingChoice = "checkpoint"
    """Rotary scaling: the checkpoint's own, or none."""
    placement: Literal["auto", "replicated", "zero3", "zero3+hpz"] = "auto"
    """Whole on every rank, sharded over all ranks, or sharded within each host. auto: whole where it fits, else
    sharded, within each host where there are several and a host can hold a copy."""
    activation_checkpointing: bool = False
    """Recompute each of its layers in backward instead of keeping it: less memory, one more forward of the decoder."""
    fresh_bridge: bool = False
    """Whether its bridge and markers start fresh though `encoder.init_from` has some at its place in the list: for a
    decoder that comes in the place of another. Decoders behind the last one there start fresh in any case."""
    chat_template: Literal["none", "llama2", "chatml", "tokenizer"] = "none"
    """How it is spoken to: as one running text (a base model), in the turns of Llama 2 Chat or of ChatML, or by the
    template that its tokenizer's files carry. In a chat the template says what the sequence begins with, not
    `data.decoder_bos`."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of shards in the mixture."""

    path: str
    """A folder of shards (`arc-ds shards build` or `index`), or the URL of one: http(s)://, s3://, gs://, hf://, sftp://
    or `pipe:COMMAND`, in which {} stands for the file's name (without {}, a slash and the name are appended)."""
    weight: Annotated[float, Range(above=0, cure="Remove a source not wanted.")] = 1.0
    """Its share of the samples, relative to the other sources."""
    task: str = "pretraining"
    """What its records become: reconstruction and continuation of a text; questions on documents with in-context
    examples; or a text or passages in chunks that are compressed in parallel."""
    in_context_examples: Count = 0
    """few_shot only: most examples before the question; their number is drawn from 0 to this (paper: 5)."""
    max_passages: Positive = 1
    """few_shot only: most passages of a record joined to one document; drawn from 1 to this, the first of the
    record are taken (paper: 4 or 5)."""
    chunk_tokens: Positive = 1024
    """long_context only: encoder tokens of a chunk."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how a record becomes a training sequence."""

    sources: tuple[SourceConfig, ...]
    """The mixture; at least one source."""
    validation: str | tuple[SourceConfig, ...] | None = None
    """Held-out shards: a folder (or URL) of pretraining records, or a list of sources, whose weights share out
    `validation.num_samples`. None: no validation."""
    batch_size: Positive = 128
    """Sequences in a global batch, over all ranks and micro-batches (the paper's 16 × 8 GPUs)."""
    reconstruction_share: float | ShareSchedule = 0.2
    """Share of reconstruction among the samples, 0 to 1, the rest is continuation; or [from_step, share] pairs that
    change it over time, the first from step 0."""
    max_context_tokens: Positive = 256
    """Longest context to compress, in encoder tokens."""
    max_prefix_tokens: Count = 256
    """Longest plain text before the context of a continuation, in decoder tokens."""
    max_continuation_tokens: Annotated[int, Range(at_least=2)] = 256
    """Longest text to continue with, in decoder tokens (the first has no row that predicts it)."""
    max_documents_tokens: Positive = 2048
    """few_shot: most encoder tokens that a sample compresses, its in-context examples' included. The question's
    own document is cut to it; examples for which there is no room are left out, the first ones first."""
    max_chunks: Positive = 32
    """long_context: most chunks of a sample."""
    max_question_tokens: Positive = 256
    """Questions: a longer one loses its beginning; in decoder tokens. A record's own chat
    prompt counts as part of it."""
    max_answer_tokens: Positive = 256
    """Questions: a longer answer is cut and its end is no target; in decoder tokens. An
    in-context example with a longer question or answer is left out. All that is cut is counted."""
    max_encoder_tokens: int | None = None
    """Most encoder tokens (memory tokens included) in one micro-batch; the largest sample that the sizes allow has to
    fit. Where a part of a rank's share has more, all ranks split their shares further, so that memory stays bounded
    whatever the lengths; what is trained on does not depend on it. None: no limit."""
    max_decoder_rows: int | None = None
    """Most decoder rows (text and compressed tokens) in one micro-batch, likewise. A sample whose text has many more
    tokens for a decoder than for the encoder, or whose chat template writes more than 256 tokens around a first turn,
    or 64 around a further one, can exceed it: it has a micro-batch of its own and is counted (data/over_limit).
    None: no limit."""
    decoder_bos: bool = True
    """Whether a decoder sequence begins with the tokenizer's begin-of-text, where it has one."""
    num_workers: Count = 2
    """Processes per rank that prepare batches; 0: in the training process. Batches do not depend on it."""
    cache_dir: str | None = None
    """Where shards from URLs are kept; local to the host. None: ARC_DS_CACHE_DIR, else XDG_CACHE_HOME/arc-ds/shards,
    else ~/.cache/arc-ds/shards. All processes of a host share it, and so may several runs."""
    cache_gib: Annotated[float, Range(above=0, cure="Write null for half of what is free.")] | None = None
    """Most that shards and token caches in `cache_dir` take, in GiB; the least recently used make room. None: half
    of what is free on its disk when the run starts, what the cache holds already included."""
    on_error: Literal["skip", "stop"] = "stop"
    """A record that cannot be used stops the run, or is replaced by another and counted; a held-out one is passed over
    and named."""

    @property
    def held_out(self) -> tuple[SourceConfig, ...]:
        """The held-out sources; none where there is no validation."""
        if isinstance(self.validation, str):
            return (SourceConfig(path=self.validation),)
        return self.validation or ()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. Learning rates are per step; each group has its own peak."""

    encoder_lr: NonNegativeFloat = 1e-5
    """Peak rate of the encoder."""
    markers_lr: NonNegativeFloat = 1e-5
    """Peak rate of the markers."""
    bridge_lr: NonNegativeFloat = 5e-5
    """Peak rate of the bridges; higher, because they start from nothing."""
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    """Warm-up to the peak and cosine to `final_lr` (paper), or warm-up and then the peak."""
    warmup_steps: int = 1000
    """Steps from `initial_lr` to the peak, 0 to steps - 1."""
    initial_lr: NonNegativeFloat = 1e-20
    """Rate of the first step."""
    final_lr: NonNegativeFloat = 1e-10
    """Rate of the last step."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: Annotated[float, Range(above=0, cure="For example 1e-8.")] = 1e-8
    """AdamW's ε."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decoupled decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """The global gradient norm is clipped to this; 0: no clipping."""
    max_skipped_steps: Count = 10
    """A step with a non-finite loss or gradient is skipped; more than this many in a row stop the run."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the labels of a batch are averaged."""

    normalize: Literal["global", "rank_mean"] = "global"
    """Sum over the labels of the global batch divided by their number, or the mean of the means of all ranks'
    `micro_batches` parts (reference), with each of the step's decoders."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, what is kept, and where a run starts from."""

    every: Annotated[int, Range(at_least=0, cure="0 saves only at the end.")] = 500
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    keep_last: Positive = 2
    """How many of the newest checkpoints stay."""
    keep_every: Annotated[int, Range(at_least=1, cure="null keeps none for good.")] | None = None
    """Checkpoints whose step is a multiple of this stay for good; None: none do."""
    resume: str = "auto"
    """auto: the newest whole checkpoint of `run_dir`, if there is one; never: a new run; else a checkpoint's folder."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """When and on how much held-out text the run is measured (design 12)."""

    every: Annotated[int, Range(at_least=0, cure="0 validates only at the end.")] = 0
    """Steps between validations; 0: only at the end."""
    num_samples: Annotated[int, Range(at_least=4, cure="Each task needs two of them.")] = 64
    """Held-out samples per decoder; shared out by the sources' weights, and evenly among a source's tasks."""
    batch_size: Positive = 8
    """Most samples per forward on each rank; the limits of a micro-batch hold too. Results do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. `metrics.jsonl` in the run's folder is written in any case."""

    mlflow: bool = True
    """Whether to track the run in MLflow."""
    experiment: str = "arc-ds"
    """The MLflow experiment."""
    run_name: str | None = None
    """The MLflow run's name. None: the name of the run's folder."""
    uri: str | None = None
    """Tracking server. None: sqlite in the run's folder. The environment's MLFLOW_TRACKING_URI wins over both."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Relative paths are relative to the folder that the command is started in."""

    run_dir: str
    """Folder of everything that the run writes; made where it does not exist."""
    steps: Positive
    """Optimizer steps of the run."""
    seed: Count = 0
    """Seed of the data's order, of the decoder of each step and of fresh weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of weights in forward and backward; master weights, gradients' sums and optimizer states are fp32 always."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: GPUs where there are any."""
    attention_backend: Literal["auto", "triton", "flash", "reference"] = "auto"
    """auto: on a GPU our kernels, or PyTorch's FlashAttention at shapes where it was measured to be faster; flash:
    FlashAttention wherever it can serve; triton, reference (plain torch): those alone."""
    micro_batches: Annotated[int, Range(at_least=1, cure="1 means no accumulation.")] = 1
    """Equal parts of each rank's share of a step, run one after the other (gradient accumulation); divides the
    rank's batch. Limits in `data` may split them further."""
    log_every: Positive = 10
    """Steps between progress lines. Metrics are kept for every step."""
    stall_limit_s: PositiveFloat = 1800.0
    """Seconds without a finished step after which every rank's stacks are written to the run's folder."""
    decoder_schedule: Literal["sample", "alternate", "same_batch"] = "sample"
    """With several decoders: the step's decoder is drawn from (seed, step), or they take turns, or every step trains
    for all of them on the same samples."""
    deepspeed: str = "ds_configs/zero3.json"
    """DeepSpeed's JSON; "auto" in it takes the number from here."""
    encoder: EncoderConfig
    """The encoder."""
    pooling: PoolingConfig = PoolingConfig()
    """Its pooling."""
    markers: MarkersConfig = MarkersConfig()
    """Its markers."""
    bridge: BridgeConfig = BridgeConfig()
    """The bridges' form; each decoder has one of its own."""
    decoders: tuple[DecoderConfig, ...]
    """The frozen decoders; at least one."""
    data: DataConfig
    """The data."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    loss: LossConfig = LossConfig()
    """The loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    validation: ValidationConfig = ValidationConfig()
    """Validation."""
    tracking: TrackingConfig = TrackingConfig()
    """Tracking."""
