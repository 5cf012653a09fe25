"""The benchmark of the sharded inference engine: its command line, a tiny run on two CPU processes, its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.benchmark import prefill_record
from ultralong_ray.benchmark.cli import main, parse, prefill_of
from ultralong_ray.benchmark.launch import RunFailed
from ultralong_ray.benchmark.prefill import Prefill
from ultralong_ray.benchmark.prefill_record import prefill_entry
from ultralong_ray.flops import ModelShape, prefill_flops

OUT = ["--out", "x.json"]
TINY = ["--shape", "tiny", "--device", "cpu", "--gpus", "2", "--ring", "2", "--length", "101", "--decode", "5"]


@pytest.mark.parametrize("name", ["128k", "1m", "1m-chunks"])
def test_presets_are_commands_that_can_run(name: str) -> None:
    prefill = prefill_of(parse(["prefill", "--preset", name, "--gpus", "4", *OUT]))
    prefill.check()
    assert (prefill.ulysses, prefill.ring, prefill.decode, prefill.layers) == (4, 1, 32, 32)
    assert prefill.length == (2**17 if name == "128k" else 2**20)
    assert prefill.chunk == (2**18 if name == "1m-chunks" else prefill.length)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape gpt2", "--shape gpt2: no such shape"),
        ("--gpus 4 --ulysses 2 --ring 1", "degrees 2x1 are not --gpus 4"),
        ("--gpus 64 --ulysses 64", "cannot split the 32 query and 8 key-value heads"),
        ("--preset 4m-layer", "no such preset; there are 128k, 1m, 1m-chunks"),
    ],
)
def test_mistakes_get_words(words: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prefill", *words.split(), "--out", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("forked_ranks")
def test_a_tiny_run_through_the_job(tmp_path: Path) -> None:
    """In chunks and in one piece: the same tokens, and every token held once."""
    tokens = []
    for index, more in enumerate(([], ["--prefill-chunk", "40"])):
        out = tmp_path / f"{index}.json"
        assert main(["prefill", *TINY, *more, "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result["status"] == "ok" and result["kernel"] == "sdpa_flash"
        assert result["decode"]["ranks_agree"] and result["prefill"]["logits_finite"]
        cache = result["kv_cache"]
        assert cache["tokens_held"] == 106
        a_token = 2 * 2 * 2 * 8 * 4  # key and value, layers, key-value heads, head_dim, float32
        assert cache["bytes_by_arithmetic"] == 106 * a_token
        assert cache["bytes_of_buffers"] == 107 * a_token, "room for three of five tokens on either rank"
        tokens.append(result["decode"]["tokens"])
    assert tokens[0] == tokens[1] and len(tokens[0]) == 5


def test_a_failed_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RunFailed("rank 1 is out of GPU memory")

    monkeypatch.setattr(prefill_record, "run_ranks", fail)
    out = tmp_path / "x.json"
    assert main(["prefill", *TINY, "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert (result["status"], result["reason"]) == ("failed", "rank 1 is out of GPU memory")
    assert result["setup"]["length"] == 101 and result["environment"]["versions"]["torch"]


def answer(seconds: float, **changes: Any) -> dict[str, Any]:
    a_rank = (2**20 + 32) // 4 * 32768 * 4
    values = {"device": "NVIDIA H200", "kernel": "flash_attn_4", "build_seconds": 1.0, "prefill_seconds": seconds}
    values |= {"decode_seconds": [0.04, 0.06], "tokens": [7, 8], "finite": True, "kv_rows": (2**20 + 32) // 4}
    return {**values, "kv_bytes": a_rank, "kv_bytes_on_device": a_rank, "peak_gpu_gib": 60.0, **changes}


def test_the_record_by_hand() -> None:
    prefill = Prefill("llama31_8b", 32, 2**20, 32, 4, "cuda", 4, 1, 2**20, "auto", 16384, 42, 570.0, 0.0)
    record = prefill_entry(prefill, [answer(90.0), answer(100.0), answer(95.0, tokens=[7, 9]), answer(91.0)])
    flops = 2 * 6_979_321_856 * 2**20 + 2 * 128256 * 4096 + 2 * 32 * 4096 * 2**40
    assert prefill_flops(ModelShape.from_config(prefill.config), 2**20) == flops
    assert record["prefill"]["mfu_causal"] == pytest.approx(flops / 100 / 4 / 989e12, rel=1e-3)
    assert record["prefill"]["tokens_per_second"] == pytest.approx(2**20 / 100)
    assert record["decode"]["tokens_per_second"] == pytest.approx(20.0)
    assert not record["decode"]["ranks_agree"]
    assert record["kv_cache"]["bytes_by_arithmetic"] == 131072 * (2**20 + 32)
    assert record["kv_cache"]["over_arithmetic"] == pytest.approx(0.0)
