"""[storage], [corpus], [prepare], [pretrain], [sft] and [cluster]."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ultralong_ray.config.base import NonNegative, Positive, PositiveFloat, Section, Share, operational
from ultralong_ray.config.screening import DeduplicateConfig
from ultralong_ray.types import StorageOptions


class StorageConfig(Section):
    """How s3:// addresses are reached. What is not given comes from the environment and the usual AWS chain."""

    endpoint: str | None = operational(None)
    """URL of an S3-compatible server; default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else AWS itself."""
    region: str | None = operational(None)
    """Default: AWS_REGION, AWS_DEFAULT_REGION, else the bucket's own."""
    path_style: bool | None = operational(None)
    """True: the bucket stands in the path. False: in the host name. Default: in the path when there is an endpoint."""
    anonymous: bool = operational(False)
    """Send no credentials: public buckets."""
    plain_checksums: bool = operational(False)
    """Leave out trailing checksums, which many S3-compatible servers refuse with 411 (seen with Ceph 16)."""
    max_attempts: Positive = operational(12)
    """Attempts at one request; the waits between them grow to 20 seconds."""

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(**self.model_dump())


TaskKind = Literal[
    "passkey",
    "key_value",
    "repetition",
    "needles",
    "rounds",
    "rounds_from_start",
    "variables",
    "common_words",
    "frequent_words",
    "questions",
    "copying",
    "arithmetic",
]


TEXT_COLUMN, MESSAGES_COLUMN = "text", "messages"


class SourceConfig(Section):
    """One source of documents."""

    kind: Literal["files", "installed", "tasks"] = "files"
    """files: Parquet, JSONL or Arrow shards. installed: the text on this machine (code, documentation, licences).
    tasks: synthetic documents that ask something, for training a base model from nothing; in [sft], conversations."""
    uri: str | None = None
    """files: a file, a folder (prefix) or a glob; local path, s3://, gs://, or a scheme of fsspec whose addresses are
    scheme://path alone (not http)."""
    storage: StorageConfig | None = operational(None)
    """How an s3:// uri is reached; default: as [storage] of the recipe says."""
    format: Literal["parquet", "jsonl", "arrow"] | None = None
    """Default: by file name."""
    text_column: Annotated[str, Field(min_length=1)] = TEXT_COLUMN
    """Column of the texts. In [[sft.sources]] and [[refine.sources]] that of the conversations, by default "messages";
    "text" there means the default."""
    input_ids_column: str | None = None
    """Column of token ids (list of integers) of documents already tokenised; then text_column is not read. Not for
    conversations."""
    domain_column: str = "domain"
    id_column: str = "id"
    domain: str | None = None
    """Fixed domain of all documents of this source; then domain_column is not read."""
    domain_pattern: str | None = None
    """Regular expression searched in a shard's address; its first group is the domain of the shard's documents.
    "folder": the name of the folder that holds the shard. Then domain_column is not read."""
    weight: PositiveFloat = 1.0
    """How often a token of this source counts when token shares are set: 2 doubles the source's part of the mix."""
    max_bad_rows_share: Share = operational(0.01)
    """Bad rows (null, empty, not a string, undecodable, without id) are set aside; more than this share stops the
    run."""
    on_bad_shard: Literal["stop", "skip"] = operational("stop")
    """A shard that cannot be read (truncated, wrong compression, no rows) stops the run or is left out and reported."""
    max_megabytes: PositiveFloat | None = None
    """installed: stop after this much text (all domains together)."""
    num_documents: Positive | None = None
    """tasks: how many documents to make."""
    max_tokens_per_document: Positive | None = None
    """tasks: length of the longest document, in tokens."""
    task_mix: dict[TaskKind, PositiveFloat] | None = None
    """tasks: share of documents of each kind (normalised to 1); default: passkey 0.4, key_value 0.3, repetition 0.3."""

    @property
    def messages_column(self) -> str:
        """Column of the conversations, where the source gives such."""
        # not by model_fields_set: a written recipe.json spells every default out, and has to mean the same
        return MESSAGES_COLUMN if self.text_column == TEXT_COLUMN else self.text_column

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> SourceConfig:
        if self.kind == "files" and not self.uri:
            raise ValueError('a source of kind "files" needs uri')
        if self.kind != "files" and self.uri:
            raise ValueError(f'a source of kind "{self.kind}" takes no uri')
        if self.kind == "tasks" and not (self.num_documents and self.max_tokens_per_document):
            raise ValueError('a source of kind "tasks" needs num_documents and max_tokens_per_document')
        if self.kind != "tasks" and self.task_mix is not None:
            raise ValueError(f'task_mix is of sources of kind "tasks"; remove it from this one of kind "{self.kind}"')
        if self.domain is not None and self.domain_pattern is not None:
            raise ValueError("a source takes domain or domain_pattern, not both")
        return self

    @field_validator("domain_pattern")
    @classmethod
    def _pattern_has_a_group(cls, value: str | None) -> str | None:
        if value is None or value == "folder":
            return value
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"domain_pattern {value!r} is no regular expression ({error})") from None
        if groups < 1:
            raise ValueError(f"domain_pattern {value!r} has no group (...) to take the domain from")
        return value


def _without_token_ids(source: SourceConfig) -> SourceConfig:
    if source.input_ids_column is not None:
        raise ValueError(
            f"input_ids_column {source.input_ids_column!r} is for documents of [[corpus.sources]]; the chat template "
            f'makes tokens of conversations. Remove it; text_column names their column if it is not "{MESSAGES_COLUMN}"'
        )
    return source


ChatSource = Annotated[SourceConfig, AfterValidator(_without_token_ids)]


class CorpusConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]


class PrepareConfig(Section):
    """Corpus shards to packed sequences: per-domain length upsampling after Fu et al. (arXiv 2402.10171)."""

    sequence_length: Positive
    """Tokens of one packed sequence."""
    token_budget: Annotated[int, Field(gt=0, le=2**62)]
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
    domain_mix: Annotated[dict[str, PositiveFloat], Field(min_length=1)] | None = None
    """Share of tokens per domain (normalised to 1); default: the corpus's own shares before sampling."""
    holdout_sequences: NonNegative = 0
    """Sequences of one long document each, kept out of training for the perplexity-by-position curve."""
    holdout_ids: tuple[str, ...] = ()
    """Ids of documents held out besides, whatever their length: the same ones in every recipe of a series."""
    seed: NonNegative = 42
    num_workers: Positive | None = operational(None)
    """Parallel tasks; default: all CPUs of the cluster."""
    keep_tokens: bool = operational(False)
    """Keep the token shards below <workdir>/tokens when the stage is done, for other recipes over the same corpus."""

    @property
    def holds_out(self) -> bool:
        """Whether documents are kept for the perplexity-by-position curve."""
        return bool(self.holdout_sequences or self.holdout_ids)

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
    seed: NonNegative = 42
    sequence_parallel_degree: Positive | Literal["auto"] = operational(1)
    """Ranks that share one sequence: ulysses_degree x ring_degree."""
    ulysses_degree: Positive | Literal["auto"] = operational("auto")
    """Ranks that split the heads; at most as many as query heads."""
    ring_degree: Positive | Literal["auto"] = operational("auto")
    """Ranks that pass keys and values around; any number."""
    attention: Literal["auto", "flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "sdpa_flash", "math"] = (
        operational("auto")
    )
    """Attention kernel. auto: the first of these, in this order, that can run."""
    zero_stage: Literal[0, 1, 2, 3] = operational(3)
    gradient_checkpointing: bool = operational(True)
    """True: a layer keeps its input and its attention output as keep_* say, and computes the rest again."""
    keep_inputs: Literal["auto", "device", "host"] = operational("auto")
    """Where layer inputs wait for the backward pass; host is pinned memory of the node."""
    keep_attention: Literal["auto", "device", "host"] = operational("auto")
    """Where attention outputs and their log-sum-exp wait."""
    keep_attention_rows: Share | Literal["auto"] = operational("auto")
    """Share of a rank's rows, the last ones, whose attention output is kept. 0: attention is computed again."""
    offload_optimizer: bool | Literal["auto"] = operational("auto")
    """True: float32 weights and optimizer state live in host memory."""
    mlp_tile_tokens: Positive | Literal["auto"] = operational("auto")
    """Rows of the MLP that exist at a time."""
    loss_tile_tokens: Positive | Literal["auto"] = operational("auto")
    """Rows of logits that exist at a time."""
    checkpoint_every_steps: Positive = operational(10)
    keep_checkpoints: Positive = operational(2)
    """The newest checkpoints that stay; older ones go when a newer one is committed."""
    keep_every_nth: Positive | None = operational(None)
    """Every n-th checkpoint stays for good; default: none."""
    checkpoint_snapshot: Literal["auto", "memory", "disk", "none"] = operational("auto")
    """What the loop waits for at a checkpoint. memory: a copy of the state in host memory, 12 bytes per parameter over
    all workers. disk: a file in local_checkpoint_folder. none: the upload itself. auto: memory where it fits, else
    disk where there is a folder, else none."""
    local_checkpoint_folder: str | None = operational(None)
    """A folder on each node's own disk, for checkpoint_snapshot "disk"."""
    hang_timeout_seconds: PositiveFloat | None = operational(None)
    """A step that takes longer is a hang: the rank to blame is named and all start again from the last checkpoint. The
    first step of an attempt may take ten times as long. Default: ten times the median step, at least 300; before there
    is a median, what a step at 5 % MFU takes, at least 1800."""
    loss_spike_factor: Annotated[float, Field(gt=1.0)] | None = operational(2.0)
    """A loss above this multiple of the median of the 20 steps before it stands out (see on_loss_spike)."""
    on_loss_spike: Literal["warn", "stop"] = operational("warn")
    """warn: an event and a line in the log. stop: the run ends, naming step, sequences and the last checkpoint."""

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> TrainConfig:
        if self.checkpoint_snapshot == "disk" and self.local_checkpoint_folder is None:
            raise ValueError(
                'checkpoint_snapshot = "disk" needs local_checkpoint_folder, a folder on every node; give it, '
                'or choose "memory", "none" or "auto"'
            )
        return self


class PretrainConfig(TrainConfig):
    """Continued pretraining at the target length."""


class SftConfig(TrainConfig):
    """Short supervised fine-tuning that restores the skills: chat template, loss on assistant tokens only."""

    sources: Annotated[tuple[ChatSource, ...], Field(min_length=1)]
    """Rows with `messages` ([{role, content}, ...]; text_column names another column) and a domain."""
    sequence_length: Positive
    """Tokens of one packed sequence."""
    max_sample_tokens: Positive = 8192
    """Longer samples are left out (the recipe trains on < 8K only)."""
    num_samples: Positive | None = None
    """Samples to draw; default: all."""
    domain_mix: dict[str, PositiveFloat] | None = None
    """Share of samples per domain (normalised to 1); without num_samples, as many as the scarcest domain allows.
    Default: as the sources have them."""
    domain_samples: dict[str, Positive] | None = None
    """Number of samples per domain, instead of domain_mix and num_samples."""
    deduplicate: DeduplicateConfig | None = None
    """Default: samples may repeat each other."""
    # no field of training: stages.py puts it into the fingerprint of prepare_sft where it is set
    long_samples_first: bool = operational(False)
    """Place samples of more than half a sequence first, so that the others fill what these leave of their sequences and
    a step has both; else all go where they fit best in the order drawn, and early short ones fill sequences alone."""
    mask_documents: bool = True

    @model_validator(mode="after")
    def _tasks_ask_something(self) -> SftConfig:
        for source in self.sources:
            if source.kind == "tasks" and "repetition" in (source.task_mix or ("repetition",)):
                raise ValueError(
                    'a source of kind "tasks" makes conversations here, and "repetition" asks nothing; give task_mix '
                    "without it"
                )
            if (source.max_tokens_per_document or 0) > self.max_sample_tokens:
                raise ValueError(
                    f"max_tokens_per_document {source.max_tokens_per_document} of a source exceeds "
                    f"sft.max_sample_tokens {self.max_sample_tokens}; a sample is never cut"
                )
        return self

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> SftConfig:
        if self.domain_samples is not None and (self.domain_mix is not None or self.num_samples is not None):
            raise ValueError(
                "sft.domain_samples gives the number of samples per domain, so sft.domain_mix and sft.num_samples "
                "have nothing to say; remove them, or remove domain_samples"
            )
        return self


class ClusterConfig(Section):
    """What the training stages ask of Ray."""

    num_workers: Positive = 1
    """Training processes: one per GPU, or one per CPU core on a laptop. With min_workers: the most there may be."""
    min_workers: Positive | None = None
    """Training starts, and starts again after a loss, with the largest number of workers from here to num_workers that
    is there, fills whole sequence-parallel groups and divides the batch. Default: num_workers and no other."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    cpus_per_worker: PositiveFloat = 1.0
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the last checkpoint, in a row with no new checkpoint in between; -1: without end."""
    preemption_grace_seconds: PositiveFloat = 60.0
    """After SIGTERM, how long a worker or the driver may take to finish the step in flight and save it."""
    peak_tflops_per_worker: PositiveFloat | None = None
    """Dense bf16 peak for MFU where the device is not in the table."""
    gpu: str | None = None
    """H100, H200, A100 (80 GB) or B200, for the planner; default: what Ray finds on the nodes."""
    gpus_per_node: Positive = 8
    """GPUs that NVLink joins."""
    host_memory_gib_per_node: PositiveFloat | None = None
    """Default: what Ray finds on the nodes; without a cluster, what the vendor's own servers have. To be stated for
    virtual machines that are given memory only as they use it."""
    network_gbytes_per_second: PositiveFloat | None = None
    """Between nodes, per GPU and direction; default: 50, one 400 Gbit/s adapter for each GPU."""
    image: str | None = None
    """Container image of all pods, with tag or digest; jobs/render.py needs it."""
    node_groups: bool = False
    """True: tasks of prepare, training and evaluate ask for nodes whose Ray label `ultralong-group` is data, train or
    eval, as cluster/ labels them. False: any node."""
    data_nodes: Positive = 4
    """CPU nodes that prepare may have at a time, where nodes come on demand."""
    evaluation_workers: Positive | None = None
    """Evaluation tasks at a time, where nodes come on demand; default: as many as the cluster holds at the start."""

    wait_minutes: PositiveFloat = 60.0
    """How long a stage waits for the nodes that it cannot start without. What can never be had is refused at once."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> ClusterConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"cluster.min_workers {self.min_workers} is above cluster.num_workers {self.num_workers}, the most "
                f"workers there may be"
            )
        return self

    def node_label(self, group: Literal["data", "train", "eval"]) -> dict[str, str]:
        """Ray label selector of a stage's nodes; empty where any node will do."""
        if not self.node_groups:
            return {}
        # Ray Data asks its autoscaler for nodes by this one key (Ray 2.60); without it any group might grow.
        return {"ultralong-group": group, **({"ray-subcluster": group} if group == "data" else {})}
