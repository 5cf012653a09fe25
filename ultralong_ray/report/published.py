"""Published figures to set beside ours, each with its source. Facts only; nothing here was measured by this project."""

from __future__ import annotations

ULTRALONG = "UltraLong paper (arXiv 2504.06214)"
RULER_README = "RULER's README (NVIDIA/RULER)"
RULER_BOUNDS = {"<128K": 2**17, "<512K": 2**19, "<1M": 2**20}  # means over 4K, 8K, ... up to and with the bound
RULER_FIRST = 4096
LVEVAL_BOUNDS = {"<128K": ("16k", "32k", "64k", "128k"), "<256K": ("16k", "32k", "64k", "128k", "256k")}
STANDARD = {"mmlu": "MMLU", "mmlu_pro": "MMLU-Pro", "math": "MATH", "gsm8k": "GSM8K", "humaneval": "HumanEval"}

# model -> per cent by column of the summary table
_LONG_COLUMNS: tuple[str, ...] = ("<128K", "<512K", "<1M", "LV <128K", "LV <256K", "InfiniteBench")
_LONG = {
    "Llama-3.1-8B-Instruct": (88.3, 68.2, 61.3, 26.55, 23.32, 24.66),
    "Llama-3-8B-Gradient-1048k": (82.4, 79.8, 77.8, 14.14, 13.48, 28.60),
    "Llama-3-8B-ProLong-512k-Instruct": (88.9, 79.6, 71.2, 25.59, 24.65, 23.54),
    "UltraLong-8B-1M": (86.6, 81.6, 79.1, 28.07, 27.02, 32.14),
    "UltraLong-8B-2M": (85.0, 80.2, 78.2, 30.03, 28.90, 32.49),
    "UltraLong-8B-4M": (84.2, 80.0, 78.0, 29.09, 28.13, 30.38),
}
_STANDARD_COLUMNS = (*STANDARD.values(), "mean")
_STANDARD = {
    "Llama-3.1-8B-Instruct": (64.83, 44.33, 47.22, 81.34, 69.51, 61.45),
    "Llama-3-8B-Gradient-1048k": (48.33, 34.15, 15.12, 53.22, 35.97, 37.36),
    "Llama-3-8B-ProLong-512k-Instruct": (65.21, 40.23, 17.16, 71.11, 10.36, 40.81),
    "UltraLong-8B-1M": (66.99, 42.44, 55.10, 79.53, 68.29, 62.47),
    "UltraLong-8B-2M": (67.31, 40.55, 51.36, 79.00, 67.07, 61.06),
    "UltraLong-8B-4M": (65.14, 43.28, 50.92, 77.71, 67.68, 60.95),
}
_RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
_RULER_BY_LENGTH = {
    "Llama-3.1-8B-Instruct": (95.5, 93.8, 91.6, 87.4, 84.7, 77.0),
    "Llama-3-8B-ProLong-512k-Instruct": (94.5, 92.5, 92.3, 89.3, 83.2, 81.6),
    "Llama-3-8B-Gradient-1048k": (92.8, 90.3, 85.7, 79.9, 76.3, 69.5),
    "GLM-4-9B-1M": (94.7, 92.8, 92.1, 89.9, 86.7, 83.1),
    "Qwen2.5-7B-1M": (96.8, 95.3, 93.0, 91.1, 90.4, 84.4),
    "Qwen2.5-14B-1M": (97.5, 97.1, 94.6, 94.9, 94.9, 92.2),
    "MegaBeam-Mistral-7B-512k": (93.8, 92.5, 92.0, 89.2, 83.7, 83.7),
}
ABLATION_COLUMN = "<1M"  # of RULER, of the 1M model before SFT
# name of our variant -> per cent
ABLATIONS = {"recipe": 80.17, "separator_none": 79.15, "rope_ntk": 76.62, "two_steps": 77.52}
ABLATIONS_SOURCE = f"{ULTRALONG}, Tables 3 and 4: RULER {ABLATION_COLUMN} of UltraLong-8B-1M, single runs"
# suite -> columns of the long table that it fills, as (name there, name in the suite's own table)
_OF_SUITE = {
    "ruler": [(name, name) for name in RULER_BOUNDS],
    "lveval": [("LV <128K", "<128K"), ("LV <256K", "<256K")],
    "infinitebench": [("InfiniteBench", "mean")],
}


def published(suite: str) -> list[dict[str, object]]:
    """Rows {"model", "source", "values": {column: per cent}} of a suite's summary table; none where none is known."""
    if suite == "standard":
        source = f"{ULTRALONG}, Table 2"
        return [
            {"model": model, "source": source, "values": dict(zip(_STANDARD_COLUMNS, values, strict=True))}
            for model, values in _STANDARD.items()
        ]
    columns = _OF_SUITE.get(suite, [])
    return [
        {
            "model": model,
            "source": f"{ULTRALONG}, Table 1",
            "values": {own: dict(zip(_LONG_COLUMNS, values, strict=True))[name] for name, own in columns},
        }
        for model, values in _LONG.items()
        if columns
    ]


def published_by_length() -> list[dict[str, object]]:
    """RULER means by context length: rows {"model", "source", "values": {tokens: per cent}}."""
    return [
        {"model": model, "source": RULER_README, "values": dict(zip(map(str, _RULER_LENGTHS), values, strict=True))}
        for model, values in _RULER_BY_LENGTH.items()
    ]
