"""The recipe: one TOML file describes a whole run. Pydantic only, nothing heavy.

Every section is frozen and refuses unknown keys. Rules across fields are checked when the recipe is read, so that a
contradiction costs a second on a laptop and not an hour of a cluster. Fields marked *operational* (how often to save,
how many workers) do not change what a stage computes and are left out of its fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that does not change what a stage computes: left out of fingerprints."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint_fields(self) -> dict[str, Any]:
        """JSON-ready dict of the fields that change what is computed."""
        fields: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("operational"):
                continue
            value = getattr(self, name)
            if isinstance(value, Section):
                value = value.fingerprint_fields()
            elif isinstance(value, tuple | list):
                value = [v.fingerprint_fields() if isinstance(v, Section) else v for v in value]
            fields[name] = value
        return fields


class ArchitectureConfig(Section):
    """Shape of a Llama-class model: checked against the base model, used alone for planning and random weights."""

    model_type: Literal["llama", "qwen2", "qwen3", "mistral"] = "llama"
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    vocab_size: Positive
    head_dim: Positive | None = None
    """Default: hidden_size / num_attention_heads."""
    rope_theta: PositiveFloat
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads_divide(self) -> ArchitectureConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; grouped-query attention needs whole groups"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; give head_dim"
            )
        return self


class RopeConfig(Section):
    """How positions are stretched. `factor` is measured from `original_context_length`."""

    scheme: Literal["llama3", "ntk", "linear", "yarn", "none"] = "llama3"
    """llama3: UltraLong's factor-only YaRN (NTK-by-parts, no temperature). yarn: Hugging Face's, with temperature."""
    factor: PositiveFloat = 1.0
    low_freq_factor: PositiveFloat = 1.0
    """alpha of YaRN: pairs that turn fewer times than this within the original window are divided by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """beta of YaRN: pairs that turn more often than this are kept."""

    @model_validator(mode="after")
    def _ramp_is_ordered(self) -> RopeConfig:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope.low_freq_factor {self.low_freq_factor} must be below rope.high_freq_factor "
                f"{self.high_freq_factor}"
            )
        if self.scheme != "none" and self.factor < 1.0:
            raise ValueError(f"rope.factor {self.factor} would shrink the window; give 1 or more")
        return self


class ModelConfig(Section):
    """The model to start from and the window to reach."""

    base: str
    """Hugging Face folder (local path or URI) or hub id; with init = "random" only its tokenizer is used."""
    revision: str | None = None
    """Hub revision; pin it for a run that must be repeatable."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random" trains from nothing in the shape of [model.architecture]: how the quickstart's base model was made."""
    architecture: ArchitectureConfig | None = None
    original_context_length: Positive
    """Tokens: the pre-training length that the RoPE factor is measured from (8192 for Llama 3.1, not 131072)."""
    base_context_length: Positive
    """Tokens: the window that the base model claims; the report draws its edge there."""
    target_context_length: Positive
    max_position_embeddings: Positive | None = None
    """Tokens written to config.json; default: target_context_length. UltraLong adds room for the answer."""
    rope: RopeConfig = RopeConfig()

    @model_validator(mode="after")
    def _window_grows(self) -> ModelConfig:
        if self.target_context_length < self.base_context_length:
            raise ValueError(
                f"model.target_context_length {self.target_context_length} is below model.base_context_length "
                f"{self.base_context_length}; nothing would be extended"
            )
        if self.original_context_length > self.base_context_length:
            raise ValueError(
                f"model.original_context_length {self.original_context_length} is above model.base_context_length "
                f"{self.base_context_length}; it is the length before any stretching, 8192 for Llama 3.1"
            )
        if self.max_position_embeddings is not None and self.max_position_embeddings < self.target_context_length:
            raise ValueError(
                f"model.max_position_embeddings {self.max_position_embeddings} is below model.target_context_length "
                f"{self.target_context_length}"
            )
        if self.init == "random" and self.architecture is None:
            raise ValueError('model.init = "random" needs [model.architecture]')
        return self

    @property
    def exported_max_position_embeddings(self) -> int:
        return self.max_position_embeddings or self.target_context_length


class SourceConfig(Section):
    """One source of documents."""

    kind: Literal["files", "installed", "tasks"] = "files"
    """files: Parquet or JSONL shards. installed: the text on this machine (code, documentation, licences).
    tasks: synthetic retrieval documents, for training a base model from nothing."""
    uri: str | None = None
    """files: a file, a folder or a glob; local path or any pyarrow / fsspec URI."""
    format: Literal["parquet", "jsonl"] | None = None
    """Default: by file name."""
    text_column: str = "text"
    domain_column: str = "domain"
    id_column: str = "id"
    domain: str | None = None
    """Fixed domain of all documents of this source; then domain_column is not read."""
    max_megabytes: PositiveFloat | None = None
    """installed: stop after this much text (all domains together)."""
    num_documents: Positive | None = None
    """tasks: how many documents to make."""
    max_tokens_per_document: Positive | None = None
    """tasks: length of the longest document, in tokens."""

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> SourceConfig:
        if self.kind == "files" and not self.uri:
            raise ValueError('a source of kind "files" needs uri')
        if self.kind != "files" and self.uri:
            raise ValueError(f'a source of kind "{self.kind}" takes no uri')
        if self.kind == "tasks" and not (self.num_documents and self.max_tokens_per_document):
            raise ValueError('a source of kind "tasks" needs num_documents and max_tokens_per_document')
        return self


class CorpusConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]


class PrepareConfig(Section):
    """Corpus shards to packed sequences: per-domain length upsampling after Fu et al. (arXiv 2402.10171)."""

    sequence_length: Positive
    """Tokens of one packed sequence."""
    token_budget: Positive
    """Tokens to pack; rounded down to whole sequences."""
    separator: Literal["<s>", "bos_eos", "none"] = "<s>"
    separator_encoding: Literal["pieces", "token"] = "pieces"
    """How "<s>" becomes ids. pieces: ordinary BPE pieces. token: one vocabulary entry, refused if there is none."""
    packing: Literal["concatenate", "whole"] = "concatenate"
    """concatenate: one stream, cut every sequence_length tokens (the recipe). whole: no document is cut unless it is
    longer than a sequence, the rest of a sequence is padding, and 95 % of the budget is enough; for training a base
    model on short tasks."""
    short_below_tokens: NonNegative = 4096
    short_keep: Share = 0.1
    """Share of the documents below short_below_tokens that are kept."""
    long_above_tokens: NonNegative = 8192
    long_repeat: Annotated[int, Field(ge=1)] = 2
    """Copies of a document above long_above_tokens that enter the draw."""
    max_repeats: Annotated[int, Field(ge=1)] = 4
    """Copies it may have where a domain cannot meet its budget otherwise."""
    domain_mix: dict[str, PositiveFloat] | None = None
    """Share of tokens per domain (normalised to 1); default: the corpus's own shares before sampling."""
    holdout_sequences: NonNegative = 0
    """Sequences of one long document each, kept out of training for the perplexity-by-position curve."""
    seed: int = 42
    num_workers: Positive | None = operational(None)
    """Parallel tasks; default: all CPUs of the cluster."""

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> PrepareConfig:
        if self.short_below_tokens > self.long_above_tokens:
            raise ValueError(
                f"prepare.short_below_tokens {self.short_below_tokens} is above prepare.long_above_tokens "
                f"{self.long_above_tokens}; a document cannot be both"
            )
        if self.long_repeat > self.max_repeats:
            raise ValueError(f"prepare.long_repeat {self.long_repeat} exceeds prepare.max_repeats {self.max_repeats}")
        if self.token_budget < self.sequence_length:
            raise ValueError(
                f"prepare.token_budget {self.token_budget} does not fill one sequence of prepare.sequence_length "
                f"{self.sequence_length}"
            )
        return self

    @property
    def num_sequences(self) -> int:
        return self.token_budget // self.sequence_length


class TrainConfig(Section):
    """What continued pretraining and SFT share: one loop serves both."""

    steps: Positive | None = None
    """Optimizer steps; default: one epoch over the prepared sequences."""
    global_batch_sequences: Positive
    """Sequences per optimizer step over all ranks."""
    micro_batch_sequences: Positive = 1
    """Sequences per forward pass of one sequence-parallel group."""
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_learning_rate_ratio: Share = 0.0
    """Where cosine and linear end, as a share of learning_rate."""
    warmup_steps: NonNegative = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    adam_beta1: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    gradient_clip: PositiveFloat | None = 1.0
    """Maximum norm of the whole gradient."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 keeps float32 master weights and optimizer state."""
    mask_documents: bool = False
    """True: a token attends only to its own document. The recipe's packs are plain causal: False."""
    seed: int = 42
    sequence_parallel_degree: Positive | Literal["auto"] = operational(1)
    """Ranks that share one sequence (Ulysses)."""
    zero_stage: Literal[0, 1, 2, 3] = operational(3)
    gradient_checkpointing: bool = operational(True)
    loss_tile_tokens: Positive = operational(2048)
    """Rows of logits that exist at a time."""
    checkpoint_every_steps: Positive = operational(10)
    keep_checkpoints: Positive = operational(2)


class PretrainConfig(TrainConfig):
    """Continued pretraining at the target length."""


class SftConfig(TrainConfig):
    """Short supervised fine-tuning that restores the skills: chat template, loss on assistant tokens only."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Rows with `messages` ([{role, content}, ...]) and a domain."""
    sequence_length: Positive
    """Tokens of one packed sequence."""
    max_sample_tokens: Positive = 8192
    """Longer samples are left out (the recipe trains on < 8K only)."""
    num_samples: Positive | None = None
    """Samples to draw; default: all."""
    mask_documents: bool = True


class EvaluateConfig(Section):
    """NIAH passkey over lengths x depths."""

    models: Annotated[tuple[Literal["base", "extended", "pretrained", "final"], ...], Field(min_length=1)] = (
        "base",
        "pretrained",
        "final",
    )
    """base: as given. extended: RoPE changed, not trained. pretrained: after CPT. final: the exported model."""
    context_lengths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Tokens, question and template included."""
    depths_percent: Annotated[tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(min_length=1)]
    samples_per_cell: Positive = 5
    chat_template: bool = True
    passkey_digits: Annotated[int, Field(ge=1, le=10)] = 5
    haystack: Literal["noise"] = "noise"
    max_new_tokens: Positive = 8
    perplexity_buckets: Positive = 16
    """Points of the perplexity-by-position curve."""
    seed: int = 1234
    prefill_chunk_tokens: Positive = operational(8192)
    precision: Literal["float32", "bfloat16"] = "float32"
    gpus_per_task: Annotated[float, Field(ge=0.0)] = operational(0.0)
    cpus_per_task: Annotated[float, Field(ge=0.0)] = operational(1.0)


class ClusterConfig(Section):
    """What the training stages ask of Ray."""

    num_workers: Positive = 1
    """Training processes: one per GPU, or one per CPU core on a laptop."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    cpus_per_worker: PositiveFloat = 1.0
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the last checkpoint after a lost worker; -1: without end."""
    peak_tflops_per_worker: PositiveFloat | None = None
    """Dense bf16 peak for MFU where the device is not in the table."""


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    workdir: str
    """Where stages write: local path or any pyarrow / fsspec URI (s3://bucket/prefix)."""
    model: ModelConfig
    corpus: CorpusConfig
    prepare: PrepareConfig
    pretrain: PretrainConfig
    sft: SftConfig | None = None
    evaluate: EvaluateConfig | None = None
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        _check_lengths(self)
        for name, train, length in self.train_stages():
            _check_parallelism(self, name, train, length)
        return self

    def train_stages(self) -> list[tuple[str, TrainConfig, int]]:
        """(section name, section, sequence length in tokens) of every training stage of the recipe."""
        stages: list[tuple[str, TrainConfig, int]] = [("pretrain", self.pretrain, self.prepare.sequence_length)]
        if self.sft is not None:
            stages.append(("sft", self.sft, self.sft.sequence_length))
        return stages

    def sequence_parallel_degree(self, train: TrainConfig) -> int:
        """The degree given, or for "auto" the largest that divides workers, heads and length."""
        if train.sequence_parallel_degree != "auto":
            return train.sequence_parallel_degree
        length = next(length for _, t, length in self.train_stages() if t is train)
        shape = self.model.architecture
        candidates = range(self.cluster.num_workers, 0, -1)
        return next(
            degree
            for degree in candidates
            if self.cluster.num_workers % degree == 0
            and length % degree == 0
            and (shape is None or heads_can_split(shape.num_attention_heads, shape.num_key_value_heads, degree))
        )


def heads_can_split(query_heads: int, kv_heads: int, degree: int) -> bool:
    """Ulysses: every rank holds whole query heads, and KV heads split or repeat evenly."""
    return query_heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)


def _check_lengths(recipe: Recipe) -> None:
    target = recipe.model.target_context_length
    if recipe.prepare.sequence_length > target:
        raise ValueError(
            f"prepare.sequence_length {recipe.prepare.sequence_length} is beyond model.target_context_length {target}"
        )
    if recipe.sft is not None:
        if recipe.sft.sequence_length > target:
            raise ValueError(
                f"sft.sequence_length {recipe.sft.sequence_length} is beyond model.target_context_length {target}"
            )
        if recipe.sft.max_sample_tokens > recipe.sft.sequence_length:
            raise ValueError(
                f"sft.max_sample_tokens {recipe.sft.max_sample_tokens} does not fit into sft.sequence_length "
                f"{recipe.sft.sequence_length}; a sample is never cut"
            )


def _check_parallelism(recipe: Recipe, name: str, train: TrainConfig, length: int) -> None:
    workers = recipe.cluster.num_workers
    if train.sequence_parallel_degree != "auto":
        degree = train.sequence_parallel_degree
        if workers % degree:
            raise ValueError(
                f"cluster.num_workers {workers} is not a multiple of {name}.sequence_parallel_degree {degree}"
            )
        if length % degree:
            raise ValueError(
                f"{name}: sequence length {length} is not divisible by {name}.sequence_parallel_degree {degree}; "
                f"the nearest lengths that are: {length // degree * degree} and {(length // degree + 1) * degree}"
            )
        shape = recipe.model.architecture
        if shape is not None:
            query_heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
            if not heads_can_split(query_heads, kv_heads, degree):
                raise ValueError(heads_message(name, query_heads, kv_heads, degree))
    groups = workers // recipe.sequence_parallel_degree(train)
    per_pass = groups * train.micro_batch_sequences
    if train.global_batch_sequences % per_pass:
        raise ValueError(
            f"{name}.global_batch_sequences {train.global_batch_sequences} is not a multiple of {per_pass} "
            f"({groups} sequence-parallel groups x {name}.micro_batch_sequences {train.micro_batch_sequences})"
        )


def heads_message(name: str, query_heads: int, kv_heads: int, degree: int) -> str:
    """The refusal of a Ulysses degree that the heads cannot take, with the degrees that they can."""
    legal = [d for d in range(1, query_heads + 1) if query_heads % d == 0 and (kv_heads % d == 0 or d % kv_heads == 0)]
    return (
        f"{name}.sequence_parallel_degree {degree} cannot split {query_heads} query heads and {kv_heads} key-value "
        f"heads; degrees that can: {', '.join(map(str, legal))}"
    )
