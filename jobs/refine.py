"""Rewrite the responses of SFT samples with a model behind a chat-completions endpoint: [refine] of the recipe."""

from ultralong_ray.data.refine import refine
from ultralong_ray.job import guarded

if __name__ == "__main__":
    guarded(lambda recipe, path, overrides: refine(recipe))
