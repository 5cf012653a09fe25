"""The project's training step and its peers', timed on the same GPUs with the same model and tokens: a JSON per run."""
