"""The whole recipe, stage after stage, each as a driver of its own."""

from pathlib import Path

from ultralong_ray.job import guarded
from ultralong_ray.pipeline import run_pipeline

if __name__ == "__main__":
    guarded(lambda recipe, path, overrides: run_pipeline(recipe, path, overrides, Path(__file__).parent))
