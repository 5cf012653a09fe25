"""vLLM by way of `ray.data.llm`: the requests of a cell as a data set in, answers out. An optional extra.

Every call builds Ray Data's processor, whose actors load the model and end with it: made for cells of many samples
(evaluate.samples_per_shard). A server that stays up and the endpoint engine suit small cells better.

Read against Ray 2.60 (data/llm.py, llm/_internal/batch/processor/vllm_engine_proc.py and stages/vllm_engine_stage.py:
rows carry `tokenized_prompt` and `sampling_params`, and come back with `generated_text`). Not run: vLLM brings a torch
of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.engines import VllmEngine as VllmConfig
from ultralong_ray.eval.engine import Request, cut_answer
from ultralong_ray.types import UserError


class VllmEngine:
    """One model of a folder, answered by vLLM on this cluster."""

    def __init__(self, config: EvaluateConfig, folder: Path) -> None:
        """Raises: UserError when vLLM is not installed."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "evaluate.engine.kind is vllm, and vLLM is not installed; pip install 'ultralong-ray[vllm]' on every "
                "node, or take kind in_process, sharded or openai"
            )
        from transformers import AutoTokenizer

        assert isinstance(config.engine, VllmConfig)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._config, self._engine, self._folder = config, config.engine, folder

    def answers(self, requests: Iterable[Request]) -> list[str]:
        """One answer per request, in order. Raises: UserError for a prompt beyond max_model_len."""
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        asked = list(requests)
        if not asked:
            return []
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=str(self._folder),
                engine_kwargs=self._engine_arguments(max(len(each.ids) + each.max_new_tokens for each in asked)),
                concurrency=self._engine.replicas,
                batch_size=self._engine.batch_size,
                chat_template_stage=False,
                tokenize_stage=False,
                detokenize_stage=False,
            ),
            postprocess=lambda row: {"number": row["number"], "generated_text": row["generated_text"]},
        )
        rows = processor(ray.data.from_items([_row(number, each) for number, each in enumerate(asked)])).take_all()
        texts = {row["number"]: row["generated_text"] for row in rows}  # in any order
        return [cut_answer(texts[number], each.stop, each.exact) for number, each in enumerate(asked)]

    def _engine_arguments(self, longest: int) -> dict[str, Any]:
        """vLLM's own. Raises: UserError for a prompt beyond max_model_len."""
        window = self._engine.max_model_len
        if window is not None and longest > window:
            raise UserError(
                f"evaluate.engine.max_model_len {window}: a prompt needs {longest} tokens with its answer; raise it, "
                f"or ask for shorter context_lengths"
            )
        arguments = {"dtype": self._config.precision, "tensor_parallel_size": self._engine.tensor_parallel_degree}
        return {**arguments, **({"max_model_len": window} if window else {}), **self._engine.engine_arguments}

    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        raise UserError("evaluate.engine: kind vllm gives no losses; perplexity needs kind in_process or sharded")

    def continuation_scores(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        raise UserError("evaluate.engine: standard/mmlu needs kind in_process or sharded; take it out of names")


def _row(number: int, request: Request) -> dict[str, Any]:
    """A row of the data set: greedy decoding of token ids. Exact stop texts save time; answers are cut here."""
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": request.max_new_tokens}
    if request.exact and request.stop:
        sampling["stop"] = list(request.stop)
    return {"number": number, "tokenized_prompt": list(request.ids), "sampling_params": sampling}
