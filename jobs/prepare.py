"""Corpus shards to packed sequences, for continued pretraining and for SFT. --plan-only stops after the plan."""

from ultralong_ray.job import plan_prepare, run_stages

if __name__ == "__main__":
    run_stages("prepare", "prepare_sft", plan=plan_prepare)
