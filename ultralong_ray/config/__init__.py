"""The recipe: one TOML file describes a whole run. Pydantic only, nothing heavy.

Every section is frozen and refuses unknown keys. Rules across fields are checked when the recipe is read, so that a
contradiction costs a second on a laptop and not an hour of a cluster. Fields marked *operational* (how often to save,
how many workers) do not change what a stage computes and are left out of its fingerprint.
"""

from ultralong_ray.config.evaluate import EvaluateConfig
from ultralong_ray.config.model import ArchitectureConfig, ModelConfig, RopeConfig
from ultralong_ray.config.recipe import Recipe
from ultralong_ray.config.refine import RefineConfig
from ultralong_ray.config.screening import BenchmarkConfig, DecontaminateConfig, DeduplicateConfig
from ultralong_ray.config.sections import (
    ClusterConfig,
    CorpusConfig,
    PrepareConfig,
    PretrainConfig,
    SftConfig,
    SourceConfig,
    StorageConfig,
    TrainConfig,
)

__all__ = [
    "ArchitectureConfig",
    "BenchmarkConfig",
    "ClusterConfig",
    "CorpusConfig",
    "DecontaminateConfig",
    "DeduplicateConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PrepareConfig",
    "PretrainConfig",
    "Recipe",
    "RefineConfig",
    "RopeConfig",
    "SftConfig",
    "SourceConfig",
    "StorageConfig",
    "TrainConfig",
]
