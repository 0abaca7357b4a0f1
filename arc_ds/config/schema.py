"""The configuration of a run: every number that a run owns, with its unit, its range and the reason for its default.

The docstring under a field is its documentation (`arc-ds train --keys` prints it). Defaults are those of the paper's
pretraining (arXiv 2510.20535, appendix B) unless a field says otherwise. `load.py` and `decode.py` load configs and
check types and ranges. `validate.py` checks keys that exclude each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from arc_ds.config.ranges import Count, NonNegativeFloat, Positive, PositiveFloat, Range
from arc_ds.errors import ConfigError
from arc_ds.system.user_paths import absolute_path, user_path

DeviceName = Literal["auto", "cuda", "cpu"]
RopeScalingChoice = Literal["checkpoint", "none"]
# The names of `arc_ds.model.pooling.STRATEGIES`, which a config must not import. A test compares the two.
PoolingStrategy = Literal[
    "mean", "last", "sum", "fusion",
    "kmeans", "kmeans_euclidean", "kmeans_cosine",
    "similarity", "similarity_dot", "similarity_cosine",
    "similarity_euclidean", "similarity_manhattan", "similarity_chebyshev",
    "prune", "prune_dot", "prune_cosine", "prune_euclidean", "prune_manhattan", "prune_chebyshev",
    "prune_norm",
]  # fmt: skip
# A path of a user: `~` is the home folder.
PathText = Annotated[str, user_path]
FilePath = Annotated[str, absolute_path]
ShareSchedule = tuple[tuple[int, float], ...]
Factor = Annotated[int, Range(at_least=1, cure="A factor is tokens per group: 1 keeps every token, 8 is the paper's.")]
Decay = Annotated[float, Range(at_least=0, below=1)]
DEFAULT_TRUNCATED_LAYERS = 2
# Which activations backward recomputes. The first version had true and false.
Recompute = Annotated[Literal["none", "selective", "full"], {"true": "full", "false": "none"}]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the linears of all layers: y = W x + (alpha / rank) B A x."""

    rank: Annotated[int, Range(at_least=1, cure="lora: null means no adapters.")]
    """Rows of A and columns of B. Both are trained; W is frozen."""
    alpha: PositiveFloat = 16.0
    """Numerator of the factor alpha / rank."""


class TrainedParts(TypedDict):
    """The trained parts of an encoder, as keyword arguments of `training.engine.set_trained`.

    trained_layers: number of last layers whose weights are trained; None for all.
    train_embeddings: whether the token embeddings are trained.
    train_memory: whether the memory tokens are trained, if there are any.
    lora_rank: rank of the adapters of all layers, which are trained; 0 for none.
    """

    trained_layers: int | None
    train_embeddings: bool
    train_memory: bool
    lora_rank: int


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The text encoder: the first layers of a pretrained backbone, and which of them are trained."""

    backbone: PathText
    """Weights and sizes of the backbone: a Hugging Face folder, a Meta/Mistral folder, or a .gguf file."""
    tokenizer: PathText | None = None
    """Tokenizer file or folder. None: the one next to the backbone (or inside the .gguf)."""
    num_layers: Positive | None = None
    """How many of the backbone's layers to keep, from the first. Excludes `num_truncated_layers`."""
    num_truncated_layers: Count | None = None
    """How many of the backbone's last layers to drop. None: 2 (the paper's) unless `num_layers` is set."""
    rope_scaling: RopeScalingChoice = "checkpoint"
    """Rotary scaling: the checkpoint's own, or none. Weights released by the paper's authors were trained with none."""
    causal: bool = False
    """Whether a token sees only the tokens before it. False: it sees the whole context, as in the paper."""
    train: Literal["all", "bridge"] = "all"
    """all: encoder, bridges and markers, limited by `trained_layers`, `train_embeddings` and `lora`. bridge: bridges
    and markers only; the encoder is frozen with its embeddings and memory tokens."""
    trained_layers: Annotated[int, Range(at_least=0, cure="0 freezes the encoder's layers.")] | None = None
    """How many of the last kept layers are trained. None: all. 0: none of them. Memory tokens are trained all the same;
    to freeze the whole encoder, set `train: bridge`."""
    train_embeddings: bool = True
    """Whether the token embeddings are trained. No effect with `train: bridge` or `lora`, which freeze them."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the encoder's own weights, which are frozen. Memory tokens are trained as
    well. The rate of both is `optimizer.encoder_lr`; adapters need about ten times that of full training (1e-4).
    Exports contain the sum, so they are ordinary encoders. None: no adapters."""
    activation_checkpointing: Recompute = "none"
    """Activations that backward recomputes (arc_ds/README.md, Memory). none: none. selective: normed rows and the FFN's
    product; no matrix product is repeated. full: each layer from its input: least memory, one more encoder forward.
    true is full, false is none."""
    init_from: PathText | None = None
    """An export or ARC checkpoint with initial encoder, markers and bridges. None: the backbone's weights and fresh
    bridges."""
    keep_ports: bool = True
    """Whether checkpoints and exports keep the bridges and markers of `init_from` whose decoders this config does not
    list. They stay equal to the bit, and their decoders are not loaded."""

    @property
    def trained_parts(self) -> TrainedParts:
        """The trained parts that `train`, `trained_layers`, `train_embeddings` and `lora` describe together."""
        if self.train == "bridge":
            return TrainedParts(trained_layers=0, train_embeddings=False, train_memory=False, lora_rank=0)
        if self.lora is not None:
            return TrainedParts(trained_layers=0, train_embeddings=False, train_memory=True, lora_rank=self.lora.rank)
        return TrainedParts(
            trained_layers=self.trained_layers,
            train_embeddings=self.train_embeddings,
            train_memory=True,
            lora_rank=0,
        )

    def kept_layers(self, num_backbone_layers: int) -> int:
        """How many layers the encoder keeps of a backbone with `num_backbone_layers`.

        Raises ConfigError if no layer would remain, or if more are requested than exist.
        """
        key = "num_layers" if self.num_layers is not None else "num_truncated_layers"
        dropped = DEFAULT_TRUNCATED_LAYERS if self.num_truncated_layers is None else self.num_truncated_layers
        kept = num_backbone_layers - dropped if self.num_layers is None else self.num_layers
        if not 1 <= kept <= num_backbone_layers:
            raise ConfigError(
                f"encoder.{key}: {kept} layers would be kept of the {num_backbone_layers} in {self.backbone}; "
                f"expected 1 to {num_backbone_layers}. Set encoder.num_layers to a number in that range."
            )
        return kept


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """How the tokens of a context become compressed tokens. Set exactly one of factors, num_groups, memory_tokens."""

    strategy: PoolingStrategy = "mean"
    """The vector of a group: mean (paper), last token, sum, or mean rescaled to the group's largest norm (fusion). The
    others choose groups by content: means of k-means clusters, neighbours merged or pruned by similarity, or rows of
    largest norm."""
    pooled_queries: bool = True
    """Pool the residual stream and the queries only; keys and values stay unpooled. Only for `where: before`."""
    where: Literal["before", "between", "after"] = "before"
    """Pool the states that enter the layer, those between its attention and its FFN, or those after the last layer,
    each scaled to root mean square 1. With `num_groups: 1`, after gives the embedding of a text as retrievers do."""
    factors: tuple[Factor, ...] = (8,)
    """Tokens per group, one factor for each of the last layers: [8] pools in the last layer, [2, 2] in the last two."""
    num_groups: Positive | None = None
    """A fixed number of groups for every context, in place of factors (then set `factors: []`)."""
    memory_tokens: Count = 0
    """Learned vectors appended to each context. Their outputs replace pooling (then set `factors: []`). 0: none."""


@dataclass(frozen=True, kw_only=True)
class MarkersConfig:
    """The learned vector after each context, in encoder width, one per task and decoder."""

    rec: bool = True
    """Whether contexts of reconstruction end with `<Rec>`."""
    cont: bool = True
    """Whether contexts of every other task end with `<Cont>`."""
    init: Literal["ones", "embedding"] = "ones"
    """Start as ones (paper), or as a token's embedding, whose norm suits a small model better."""


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The map from encoder width to decoder width."""

    kind: Literal["mlp", "mlp_gelu", "linear", "rms", "none"] = "mlp"
    """mlp: two linears without bias or activation. mlp_gelu: with GELU between them. linear: one linear. rms: RMSNorm
    and two linears. none: no map (the widths must be equal)."""
    hidden_size: Annotated[int, Range(at_least=1, cure="null takes the decoder's width.")] | None = 2048
    """Width between the two linears. None: the decoder's width. No effect for `linear` and `none`."""
    init: Literal["kaiming", "identity"] = "kaiming"
    """Kaiming-uniform with a = √5 (paper), or the identity: a warm start if all widths are equal."""
    shared: bool = False
    """Whether all decoders share one bridge, which every step trains. Their widths must be equal. Markers are not
    shared. False: one bridge per decoder (paper)."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder. Its weights are frozen."""

    name: str
    """Unique name in metrics and in `generate`: letters, digits, `_`, `-`, `.`."""
    backbone: PathText = ""
    """Weights and sizes: a Hugging Face folder, a Meta/Mistral folder, or a .gguf file. Required if `train` is true."""
    train: bool = True
    """Whether the run trains this decoder's bridge and markers. False: they come from `encoder.init_from`, and
    checkpoints and exports keep them equal to the bit. No step uses the decoder, and its files are not read."""
    tokenizer: PathText | None = None
    """Tokenizer file or folder. None: the one next to the backbone (or inside the .gguf)."""
    rope_scaling: RopeScalingChoice = "checkpoint"
    """Rotary scaling: the checkpoint's own, or none."""
    implementation: Literal["auto", "native", "transformers"] = "auto"
    """native: our packed transformer. transformers: the model's own code, for families that ours does not compute;
    slower. auto: native if it computes the model, else transformers; the log says why."""
    trust_remote_code: bool = False
    """Whether transformers may run the Python files in the decoder's folder. Read them before you set it."""
    placement: Literal["auto", "replicated", "zero3", "zero3+hpz"] = "auto"
    """replicated: whole on every rank. zero3: sharded over all ranks. zero3+hpz: sharded within each host. auto: whole
    if it fits; otherwise sharded, within each host if there are several hosts and a host can hold a copy."""
    activation_checkpointing: Recompute = "none"
    """Activations that backward recomputes (arc_ds/README.md, Memory). none: none. selective: the FFN's up to its last
    product. full: each layer from its input: least memory, one more decoder forward. true is full, false is none.
    Through transformers selective is not available."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of this decoder with its bridge, at the rate `optimizer.encoder_lr`. Its own weights stay
    frozen. Exports contain the adapters, and `ArcModel` adds them to the decoder's weights; servers that run the
    decoder themselves are refused. Rows before the compressed ones then take part in backward. Only for
    `implementation: native`. None: no adapters."""
    fresh_bridge: bool = False
    """Start with a fresh bridge, markers and adapters. Set it for a new decoder. Otherwise a decoder continues those of
    its name in `encoder.init_from`, or those at its place in the list if no decoder here has their name. Decoders
    beyond the list of `encoder.init_from` always start fresh."""
    chat_template: Literal["none", "llama2", "chatml", "tokenizer"] = "none"
    """none: one running text (a base model). llama2, chatml: the turns of Llama 2 Chat or ChatML. tokenizer: the
    template in its tokenizer's files. In a chat the template decides how the sequence begins, not `decoder_bos`."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of shards in the mixture."""

    path: PathText
    """A folder of shards (`arc-ds shards build` or `index`), or its URL: http(s)://, s3://, gs://, abfs://, hf://,
    sftp:// or `pipe:COMMAND`. In a command, {} stands for the file's name; without {}, a slash and the name are
    appended."""
    weight: Annotated[float, Range(above=0, cure="Remove a source that you do not want.")] = 1.0
    """Its share of the samples, relative to the other sources."""
    task: str = "pretraining"
    """The samples that its records become. pretraining: reconstruction and continuation of a text. few_shot,
    question_answering: questions on documents, with or without in-context examples. long_context: a text or passages
    in chunks that are compressed in parallel."""
    in_context_examples: Count = 0
    """few_shot only: maximum number of examples before the question. The number is drawn from 0 to this (paper: 5)."""
    max_passages: Positive = 1
    """few_shot only: maximum number of passages joined into one document. The number is drawn from 1 to this, and the
    first passages of the record are used (paper: 4 or 5)."""
    chunk_tokens: Positive = 1024
    """long_context only: encoder tokens of a chunk."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The sources, and how a record becomes a training sequence."""

    sources: tuple[SourceConfig, ...]
    """The mixture; at least one source."""
    validation: PathText | tuple[SourceConfig, ...] | None = None
    """Held-out shards: a folder (or URL) of pretraining records, or a list of sources. The weights of the sources
    divide `validation.num_samples` among them. None: no validation."""
    batch_size: Positive = 128
    """Sequences in a global batch, over all ranks and micro-batches (the paper's 16 × 8 GPUs)."""
    reconstruction_share: float | ShareSchedule = 0.2
    """Share of reconstruction among the pretraining samples, 0 to 1; the rest is continuation. Or a list of [from_step,
    share] pairs that change it over time; the first pair starts at step 0."""
    max_context_tokens: Positive = 256
    """Longest context to compress, in encoder tokens."""
    max_prefix_tokens: Count = 256
    """Longest plain text before the context of a continuation, in decoder tokens."""
    max_continuation_tokens: Annotated[int, Range(at_least=2)] = 256
    """Longest text to continue with, in decoder tokens (no row predicts the first one)."""
    max_documents_tokens: Positive = 2048
    """few_shot: maximum encoder tokens that a sample compresses, including its in-context examples. The question's own
    document is cut to it. Examples that do not fit are left out, the first ones first."""
    max_chunks: Positive = 32
    """long_context: maximum number of chunks of a sample."""
    max_question_tokens: Positive = 256
    """Longest question, in decoder tokens. A longer one loses its beginning. A record's own chat prompt counts as part
    of the question."""
    max_answer_tokens: Positive = 256
    """Longest answer, in decoder tokens. A longer one loses its end, and then its end is no target. An in-context
    example with a longer question or answer is left out. All cuts are counted."""
    max_encoder_tokens: int | None = None
    """Maximum encoder tokens (including memory tokens) in one micro-batch. The largest sample that the sizes allow must
    fit. If a part of a rank's share has more, all ranks split their shares further, so memory stays bounded at any
    lengths. The trained samples do not depend on it. None: no limit."""
    max_decoder_rows: int | None = None
    """Maximum decoder rows (text and compressed tokens) in one micro-batch; works like `max_encoder_tokens`. Two kinds
    of sample can exceed it: a text with many more tokens for the decoder than for the encoder, and a chat template with
    more than 256 tokens around the first turn or 64 around a further one. Such a sample runs in a micro-batch of its
    own and is counted (data/over_limit). None: no limit."""
    decoder_bos: bool = True
    """Whether a decoder sequence begins with the tokenizer's begin-of-text, if it has one."""
    num_workers: Count = 2
    """Processes per rank that prepare batches. 0: the training process prepares them. Batches do not depend on it."""
    cache_dir: PathText | None = None
    """Folder for shards from URLs, local to the host. None: ARC_DS_CACHE_DIR, else XDG_CACHE_HOME/arc-ds/shards, else
    ~/.cache/arc-ds/shards. All processes of a host share it, and several runs may."""
    cache_gib: Annotated[float, Range(above=0, cure="Write null for half of the free space.")] | None = None
    """Maximum size of the shards and token caches in `cache_dir`, in GiB. The least recently used are evicted. None:
    half of the free space on its disk at the start of the run, counting the cache's current content as free."""
    on_error: Literal["skip", "stop"] = "stop"
    """stop: a record that cannot be used stops the run. skip: another record replaces it, and it is counted. A held-out
    record is skipped and named."""

    @property
    def held_out(self) -> tuple[SourceConfig, ...]:
        """The held-out sources; empty without validation."""
        if isinstance(self.validation, str):
            return (SourceConfig(path=self.validation),)
        return self.validation or ()


TimesMedian = Annotated[float, Range(above=1, cure="For example 5.")]


@dataclass(frozen=True, kw_only=True)
class SkipSpikesConfig:
    """Skip the update of a step whose loss or gradient norm is far above the median of earlier steps."""

    loss: TimesMedian = 2.0
    """A loss above this many times the median is a spike."""
    gradient_norm: TimesMedian = 5.0
    """A gradient norm (before clipping) above this many times the median is a spike."""
    window: Annotated[int, Range(at_least=2)] = 100
    """The medians are those of this many latest steps, for each set of decoders. No step is skipped before half of them
    are done."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. Learning rates change per step; each group has its own peak."""

    encoder_lr: NonNegativeFloat = 1e-5
    """Peak rate of the encoder."""
    markers_lr: NonNegativeFloat = 1e-5
    """Peak rate of the markers."""
    bridge_lr: NonNegativeFloat = 5e-5
    """Peak rate of the bridges; higher, because they start from random weights."""
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    """one_cycle: warm-up to the peak, then cosine to `final_lr` (paper). constant: warm-up, then the peak."""
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
    """Maximum global gradient norm; larger gradients are clipped to it. 0: no clipping."""
    max_skipped_steps: Count = 10
    """A step with a non-finite loss or gradient, or with a spike (`skip_spikes`), is skipped. More than this many in a
    row stop the run (exit code 7)."""
    skip_spikes: SkipSpikesConfig | None = None
    """Skip steps with a spike of the loss or of the gradient norm; `{}` takes the default factors. None: only steps
    that are not finite are skipped."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The ranks of a run."""

    timeout_s: PositiveFloat = 300.0
    """Seconds for the ranks to find each other, and seconds of silence after which a rank counts as lost and all others
    end (exit code 4). A rank that computes, reads or waits for data is not silent: each sends a sign of life every
    second."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the labels of a batch are averaged."""

    normalize: Literal["global", "rank_mean"] = "global"
    """global: sum over the labels of the global batch, divided by their number. rank_mean: mean of the means of all
    ranks' `micro_batches` parts (reference). Both per decoder of the step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, which checkpoints to keep, and from which one to resume."""

    every: Annotated[int, Range(at_least=0, cure="0 saves only at the end.")] = 500
    """Steps between checkpoints. 0: only at the end and at a stop signal."""
    keep_last: Positive = 2
    """How many of the newest checkpoints to keep."""
    keep_every: Annotated[int, Range(at_least=1, cure="null keeps none permanently.")] | None = None
    """Checkpoints whose step is a multiple of this are kept permanently. None: no checkpoint is."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written. This takes host memory for a copy of the trained state:
    12 bytes for each trained parameter, divided by the ranks. On a GPU it takes up to twice that, because page-locked
    memory is allocated in powers of two."""
    on_error: Literal["continue", "stop"] = "stop"
    """If a checkpoint cannot be written (full disk, read-only folder). continue: the run warns, counts it and trains on
    to the next save. stop: the run ends, with exit code 8 if the disk is full. The last save must succeed."""
    resume: PathText = "auto"
    """auto: the newest complete checkpoint of `run_dir`, if any. never: a new run. Otherwise: the folder of a
    checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """When to validate, and on how many held-out samples (arc_ds/data/README.md)."""

    every: Annotated[int, Range(at_least=0, cure="0 validates only at the end.")] = 0
    """Steps between validations. 0: only at the end."""
    num_samples: Annotated[int, Range(at_least=4, cure="Each task needs two samples.")] = 64
    """Held-out samples per decoder. They are divided by the sources' weights, and evenly among a source's tasks."""
    batch_size: Positive = 8
    """Maximum samples per forward on each rank. The limits of a micro-batch apply too. Results do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation of the current weights on question sets during training (arc_ds/evaluation/README.md)."""

    config: PathText
    """YAML config of an evaluation, such as ds_configs/eval/demo.yaml. The run's own model is evaluated with each
    trained decoder; `systems`, `output`, `device` and `dtype` of that config are not used. Choose few samples."""
    every: Annotated[int, Range(at_least=0, cure="0 evaluates only at the end.")] = 0
    """Steps between evaluations. 0: only at the end."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. The run always writes `metrics.jsonl` to its folder."""

    mlflow: bool = True
    """Whether to track the run in MLflow."""
    experiment: str = "arc-ds"
    """The MLflow experiment."""
    run_name: str | None = None
    """The MLflow run's name. None: the name of the run's folder."""
    uri: PathText | None = None
    """Tracking server. None: `mlflow.db` in the folder that holds run_dir, which all runs there share.
    `sqlite:///PATH/mlflow.db` gives a run a file of its own. MLFLOW_TRACKING_URI in the environment overrides both."""
    system_metrics_every_s: Annotated[float, Range(at_least=0, cure="0 turns them off.")] = 30.0
    """Seconds between samples of each host's processors, memory, disk and network for MLflow. 0: none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Relative paths start at the folder in which the command runs."""

    run_dir: PathText
    """Folder for everything that the run writes. It is created if it does not exist."""
    steps: Positive
    """Optimizer steps of the run."""
    seed: Annotated[int, Range(at_least=0, below=2**64)] = 0
    """Seed of the data's order, of the decoder of each step and of fresh weights."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights in forward and backward. Master weights, gradient sums and optimizer states are always
    fp32."""
    device: DeviceName = "auto"
    """auto: GPUs if there are any, otherwise the CPU."""
    attention_backend: Literal["auto", "triton", "flash", "reference"] = "auto"
    """auto: our kernels on a GPU, or PyTorch's FlashAttention at shapes at which it was measured to be faster. flash:
    FlashAttention for all shapes that it supports. triton, reference (plain torch): only that backend."""
    micro_batches: Annotated[int, Range(at_least=1, cure="1 means no accumulation.")] = 1
    """Equal parts of each rank's share of a step, run one after the other (gradient accumulation). Must divide the
    rank's batch. Limits in `data` may split the parts further."""
    log_every: Positive = 10
    """Steps between progress lines. Metrics are kept for every step."""
    stall_limit_s: PositiveFloat = 1800.0
    """Seconds without a finished step, or a batch of a validation, after which every rank writes its stacks to the
    run's folder and the run ends (exit code 5)."""
    decoder_schedule: Literal["sample", "alternate", "same_batch"] = "sample"
    """With several decoders. sample: each step's decoder is drawn from (seed, step). alternate: they take turns.
    same_batch: every step trains for all of them on the same samples."""
    deepspeed: PathText = "ds_configs/zero3.json"
    """DeepSpeed's JSON. "auto" in it takes the number from this config."""
    encoder: EncoderConfig
    """The encoder."""
    pooling: PoolingConfig = PoolingConfig()
    """Its pooling."""
    markers: MarkersConfig = MarkersConfig()
    """Its markers."""
    bridge: BridgeConfig = BridgeConfig()
    """The form of the bridges."""
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
    distributed: DistributedConfig = DistributedConfig()
    """The ranks."""
    validation: ValidationConfig = ValidationConfig()
    """Validation."""
    evaluation: EvaluationConfig | None = None
    """Evaluation on question sets. None: none."""
    tracking: TrackingConfig = TrackingConfig()
    """Tracking."""

    @property
    def trained_decoders(self) -> dict[int, DecoderConfig]:
        """The decoders whose ports the run trains, by their index in `decoders`."""
        return {idx: decoder for idx, decoder in enumerate(self.decoders) if decoder.train}
