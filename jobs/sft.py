"""Short supervised fine-tuning after continued pretraining."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("sft")
