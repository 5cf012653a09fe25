"""Evaluation room: passkey prompts, in-process generation, and the fan-out of both over a Ray cluster."""
