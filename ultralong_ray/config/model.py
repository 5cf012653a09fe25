"""[model]: what to start from, its shape, and how its positions are stretched."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ultralong_ray.config.base import Positive, PositiveFloat, Section


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
    angles: Literal["exact", "float32"] = "exact"
    """How position x frequency is computed. float32: as transformers and vLLM do, off by up to 0.125 rad at 4M tokens.
    exact: from a float64 product. Written to config.json, so that training and this project's evaluation agree."""

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
