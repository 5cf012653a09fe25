"""Passkey grids and perplexity by position, fanned out over the cluster."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("evaluate")
