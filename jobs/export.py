"""The final Hugging Face folder with its model card."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("export")
