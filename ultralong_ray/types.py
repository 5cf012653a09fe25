"""The nouns that rooms exchange, in the order in which data flows. Numpy and the standard library only.

Document -> TokenizedDocument -> Placement / PackedSequence -> SequenceSlice -> StepMetrics, then
PasskeyPrompt -> CellResult. Two contracts are stated here and tested where they are kept:

*Label shift.* `SequenceSlice` is the one place where labels are shifted: `labels[t]` is the token after
`input_ids[t]` in the same sequence. Nothing downstream shifts again.

*Loss weight.* `loss_weight[t]` belongs to the *predicted* token after the shift. 0 means "not a target". The loss of
a step is sum(weight * cross_entropy) / sum(weight) over the whole global batch, whatever rank holds a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
ByteArray = NDArray[np.uint8]


class UserError(Exception):
    """Something the user can mend. The message names the field or file, the value, the limit and the remedy.

    Jobs print it without a traceback and exit with 2.
    """


class MissingInput(UserError):
    """A stage was asked to run before the stage that feeds it."""


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """How an S3-compatible store is reached; what is None comes from the environment and the usual AWS chain."""

    endpoint: str | None = None  # URL of a server other than AWS
    region: str | None = None
    path_style: bool | None = None  # bucket in the path, not in the host name; None: with an endpoint only
    anonymous: bool = False
    plain_checksums: bool = False  # leave out the trailing checksums that older servers refuse
    max_attempts: int = 12  # of one request


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus. `id` is unique within a corpus; `domain` is the unit whose token share is held."""

    id: str
    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A document as token ids, without separator. `loss_weight` is None when every token counts once."""

    id: str
    domain: str
    input_ids: IntArray  # [num_tokens]
    loss_weight: ByteArray | None = None  # [num_tokens], weight of this token as a target


@dataclass(frozen=True, slots=True)
class DocumentLength:
    """What the plan needs to know of a document: sampling never looks at text."""

    id: str
    domain: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SampledDocument:
    """Copy number `copy` (0, 1, ...) of a document; only its first `num_tokens` tokens are used."""

    id: str
    domain: str
    copy: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Tokens [document_start, document_end) of a document copy stand at [start, end) of a packed sequence."""

    sequence: int
    start: int
    end: int
    id: str
    domain: str
    copy: int
    document_start: int
    document_end: int


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Exactly `sequence_length` tokens. Where its documents stand is said by `Placement` rows, not here."""

    index: int
    input_ids: IntArray  # [sequence_length]
    loss_weight: ByteArray | None = None  # [sequence_length], weight of this token as a target; None: 1 everywhere


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """What one sequence-parallel rank reads of a micro-batch: its part of every sequence.

    `document_ids` covers the whole sequence, not the slice, since a mask needs it after the all-to-all; it is None
    when attention is plain causal over the pack (the recipe's "no cross-document mask").
    """

    input_ids: NDArray[np.int64]  # [batch, seq_local]
    labels: NDArray[np.int64]  # [batch, seq_local], already shifted; the last token of a sequence has label -100
    loss_weight: NDArray[np.float32]  # [batch, seq_local], 0 where labels are -100
    position_ids: NDArray[np.int64]  # [batch, seq_local]
    document_ids: NDArray[np.int32] | None  # [batch, seq_global]


@dataclass(frozen=True, slots=True)
class LayerKeep:
    """Where one decoder layer keeps what the backward pass needs of the forward pass; the rest is computed again.

    `attention_rows` is the share of this rank's rows, the last ones, whose attention output and log-sum-exp are kept:
    causal attention costs most in the last rows, so half of them saves three quarters of the attention's replay.
    """

    inputs: Literal["device", "host"] = "device"
    attention: Literal["device", "host"] = "device"
    attention_rows: float = 1.0  # 0: attention is computed again as a whole


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """How a training stage is laid out on its workers: every "auto" of its section decided."""

    ulysses_degree: int
    ring_degree: int
    keep: tuple[LayerKeep, ...]  # by decoder layer; empty: no replay, autograd keeps everything on the device
    mlp_tile_tokens: int
    loss_tile_tokens: int
    offload_optimizer: bool
    checkpoint_snapshot: Literal["memory", "disk", "none"] = "none"  # where the loop leaves the state at a checkpoint

    @property
    def degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step, as logged to `metrics.jsonl`, TensorBoard and the Ray dashboard."""

    step: int  # 1-based: the number of optimizer steps taken
    num_steps: int
    loss: float  # weighted mean over the global batch, nats per token
    grad_norm: float  # of the whole gradient, before clipping
    learning_rate: float
    tokens: int  # tokens consumed so far, over all ranks
    tokens_per_second: float
    step_seconds: float
    model_flops_causal: float  # of this step: 6*N*s + 6*L*h*s^2 per sequence
    hardware_flops: (
        float  # of this step, as executed: what is computed again is counted, flash backward is 2.5 forwards
    )
    alst_flops: float  # of this step: 8*N*s + 16*L*h*s^2 per sequence, to compare with figures counted so
    mfu: float | None  # causal model FLOPs over the devices' peak, None where that is unknown
    memory_gib: float  # peak of the fullest rank: GPU memory, or resident memory on CPU
    epoch: int
    sequence: int  # sequences of the current epoch consumed so far
    checkpoint_seconds: float = 0.0  # that the loop then stood still for a checkpoint; not in step_seconds


@dataclass(frozen=True, slots=True)
class PasskeyPrompt:
    """One needle question. `depth_percent` 0 is the start of the haystack, 100 its end."""

    context_length_tokens: int
    depth_percent: float
    sample: int
    prompt: str
    expected: str
    ids: list[int]  # of `prompt`, as the model reads them
    message: str = ""  # what the chat template rendered; empty without one
    answer_prefix: str = ""  # with which `prompt` ends


@dataclass(frozen=True, slots=True)
class CellResult:
    """One evaluated cell: a model, a task, a length, a depth and a shard of its samples, with every answer kept.

    `samples` hold at least answer, expected, right (all of it), score (0 to 1), prompt_end and prompt_tokens.
    """

    model: str
    context_length_tokens: int
    depth_percent: float | None  # None: the task has no depth
    score: float  # mean of the samples' scores, 0 to 1
    samples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    task: str = "passkey"  # else as `Sample.task`: "ruler/vt"
    shard: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # what the answers depend on, for a reader


SOURCE_FACTS = ("haystack", "words", "questions_from", "texts_from")  # of an evaluation sample: where texts are from
STAND_INS = ("made up", "built in")  # sources that are here instead of a benchmark's own


def sources_of(facts: Mapping[str, Any]) -> set[str]:
    """Where the texts of an evaluation sample are from, as its facts say: {"words: built in", "haystack: essays.json"}.

    Two samples of equal seed and number ask different questions where these differ.
    """
    return {f"{name.replace('_', ' ')}: {facts[name]}" for name in SOURCE_FACTS if name in facts}


def stand_ins(sources: Iterable[str]) -> list[str]:
    """Those of `sources_of` with which a benchmark's scores are not the published ones' like."""
    return sorted(source for source in sources if source.partition(": ")[2] in STAND_INS)
