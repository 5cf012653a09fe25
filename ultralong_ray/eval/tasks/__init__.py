"""Benchmark tasks: files and seeds in, samples with plain-text prompts and pure scores out. No torch, no Ray.

A task makes `sample.Sample`s; `prompt.Prompts` writes and measures them for one tokenizer; `score.score` judges an
answer. RULER, the needle sentence and the tasks of our own are generated to a token budget, LV-Eval and InfiniteBench
are read from files.
"""
