"""Continued pretraining at the target length."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("pretrain")
