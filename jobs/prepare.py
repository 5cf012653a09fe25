"""Corpus shards to packed sequences, for continued pretraining and for SFT."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("prepare", "prepare_sft")
