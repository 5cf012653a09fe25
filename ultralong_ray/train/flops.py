"""Model FLOPs of training and the share of a device's peak that they reach.

Counted as causal model FLOPs, without recomputation: 6*N*s for the matrices and 6*L*h*s^2 for attention, whose
forward is 2*L*h*s^2 once the upper triangle is left out and whose backward is twice that. ALST-style counters give up
to 2.7 times more for the same step.
"""

from __future__ import annotations

from typing import Any

# Dense bf16, TFLOP/s, from the vendor's data sheets, without sparsity. The key is part of torch's device name.
PEAK_TFLOPS = {"H100": 989.5, "H200": 989.5, "A100": 312.0, "B200": 2250.0}


def matmul_parameters(config: dict[str, Any]) -> int:
    """Parameters that multiply every token: all but the input embeddings. `config`: a Llama-class config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)  # query and output, key and value
    mlp = 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (attention + mlp) + config["vocab_size"] * hidden


def model_flops(config: dict[str, Any], sequence_length: int) -> float:
    """Causal model FLOPs of forward and backward over one sequence."""
    heads = config["num_attention_heads"]
    attention_width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    matrices = 6.0 * matmul_parameters(config) * sequence_length
    return matrices + 6.0 * config["num_hidden_layers"] * attention_width * float(sequence_length) ** 2


def peak_flops(device_name: str | None, peak_tflops: float | None) -> float | None:
    """FLOP/s of one device: the given peak, else the table's, else None."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    known = [peak for key, peak in PEAK_TFLOPS.items() if device_name and key in device_name]
    return known[0] * 1e12 if known else None


def mfu(flops: float, seconds: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOP utilisation, 0 to 1; None where the peak is unknown."""
    return None if peak is None else flops / seconds / num_devices / peak
