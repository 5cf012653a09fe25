"""The base model with its RoPE stretched to the target window."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("extend")
