"""Extend the context window of an aligned Llama-class model to 1M-4M tokens, on a Ray cluster.

Importing the package imports nothing heavy: torch, ray, deepspeed and transformers are imported by the rooms
that need them (`tests/test_layers.py` holds the table).
"""

__version__ = "0.1.0"
