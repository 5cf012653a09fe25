"""The preflight: each check says no to what is broken and yes to what is not, and one rank's no stops all."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import ARCHITECTURE, job, write_inputs
from ultralong_ray.config import RopeConfig
from ultralong_ray.model.rope import inv_freq, to_hf
from ultralong_ray.parallel.kernels import math, sdpa_flash
from ultralong_ray.parallel.kernels.check import sampled_rows
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.train import preflight as checks
from ultralong_ray.train.bandwidth import slow_link
from ultralong_ray.train.machine import available_host_bytes, free_bytes, loaded_libraries
from ultralong_ray.train.preflight import (
    RunShape,
    boundary_finding,
    check_first_loss,
    check_size,
    cudnn_finding,
    heads_finding,
    host_memory_finding,
    kept_host_bytes,
    kernel_finding,
    rope_finding,
)
from ultralong_ray.types import LayerKeep, TrainPlan, UserError

CPU = torch.device("cpu")
LLAMA = RunShape("pretrain", 2**20, 1, 32, 4096, 32, 8, 128, torch.bfloat16)
SMALL = RunShape("pretrain", 600, 1, 2, 32, 8, 2, 8, torch.float32)


def plan(ulysses: int = 4, ring: int = 1, keep: tuple[LayerKeep, ...] = ()) -> TrainPlan:
    return TrainPlan(ulysses, ring, keep, 0, 0, False)


def damaged(**changes: Any) -> Kernel:
    """The reference with some results multiplied: position in the result -> (rows, factor)."""

    def forward(*inputs: Any) -> Any:
        output, lse = math.forward(*inputs)
        if "output" in changes:
            rows, factor = changes["output"]
            output[:, rows] *= factor
        return output, lse

    def backward(*inputs: Any) -> Any:
        grads = math.backward(*inputs)
        for name, (rows, factor) in changes.items():
            if name != "output":
                grads[("dq", "dk", "dv").index(name)][:, rows] *= factor
        return grads

    return Kernel("damaged", cast(Any, forward), cast(Any, backward))


@pytest.mark.parametrize("kernel", [math.load(), sdpa_flash.load()], ids=lambda kernel: kernel.name)
def test_a_right_kernel_passes_on_cut_heads_and_over_a_ring_length(kernel: Kernel) -> None:
    for layout in (plan(1), plan(2, 2), plan(8)):
        finding = kernel_finding(SMALL, layout, kernel, CPU)
        assert finding.ok, finding.words
        assert f"{kernel.name} at {600 // layout.ring_degree} tokens" in finding.words


@pytest.mark.parametrize(
    ("what", "rows", "factor"),
    [
        ("output", slice(599, None), 1.01),  # the last row alone
        ("output", slice(0, 1), float("nan")),
        ("dq", slice(127, 129), 1.1),
        ("dk", slice(598, None), 1.1),
        ("dv", slice(300, None), 0.0),
    ],
)
def test_a_kernel_that_is_wrong_somewhere_is_refused(what: str, rows: slice, factor: float) -> None:
    finding = kernel_finding(SMALL, plan(1), damaged(**{what: (rows, factor)}), CPU)
    assert not finding.ok and 'force another with pretrain.attention = "..."' in finding.words


def test_samples_lie_at_the_ends_and_about_every_boundary() -> None:
    rows = sampled_rows(2**22, 512)
    assert {0, 1, 65535, 65536, 65537, 2**22 - 1} <= set(rows) and rows == sorted(set(rows))
    assert {2**21 - 1, 2**21, 2**21 + 1} <= set(rows)  # 2^30 elements lie there; 2^31 is the end
    assert 60 <= len(rows) <= 70
    assert {2**21 - 1, 2**21} <= set(sampled_rows(2**22, 1024)) and sampled_rows(1, 8) == [0]


def test_the_check_takes_a_bounded_time_at_any_length() -> None:
    assert check_size(131072, 4, 128) == (4, 131072)
    assert check_size(2**20, 4, 128) == (4, 2**20), (
        "all query heads of a key-value head: another number, another kernel"
    )
    for seq, group, expected in ((2**22, 4, 4), (2**22, 5, 1), (2**24, 4, 1)):
        heads, gradient_rows = check_size(seq, group, 128)
        assert heads == expected and 2**20 < gradient_rows < seq
        assert 5.0 * gradient_rows**2 * 128 * heads <= checks.BACKWARD_FLOPS


def test_the_check_asks_no_call_beyond_the_limit() -> None:
    seen: list[int] = []

    def forward(query: torch.Tensor, *rest: Any) -> Any:
        seen.append(query.numel())
        return math.forward(query, *rest)

    small = Kernel("small", cast(Any, forward), math.backward, 600 * SMALL.head_dim)
    finding = kernel_finding(SMALL, plan(1), small, CPU)
    assert finding.ok and seen == [600 * SMALL.head_dim]


def test_the_2_31_boundary_says_one_call_or_more_or_none() -> None:
    limited = Kernel("flash_attn_4", math.forward, math.backward, 2**31)
    four_million = replace(LLAMA, sequence_length=2**22)
    assert "one call" in boundary_finding(four_million, plan(8), limited).words
    split = boundary_finding(four_million, plan(4), limited)
    assert split.ok and "4,294,967,296 query elements a rank: at least 2 calls" in split.words
    assert "one call" in boundary_finding(four_million, plan(4, 2), limited).words
    refused = boundary_finding(replace(LLAMA, sequence_length=2**25), plan(32), limited)
    assert not refused.ok and "raise pretrain.ring_degree" in refused.words


def test_heads_that_do_not_divide_are_refused() -> None:
    assert heads_finding(LLAMA, 16).words == "2 query and 1 key-value heads a rank"
    refused = heads_finding(LLAMA, 12)
    assert not refused.ok and "do not divide over 12 ranks; set pretrain.ulysses_degree" in refused.words


def test_a_system_cudnn_is_a_warning_and_stops_attention_that_runs_on_it() -> None:
    wheel = ["/venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn.so.9"]
    assert not cudnn_finding("cudnn", 91900, "9.19.0.56", wheel).warning
    for version, libraries in ((91900, [*wheel, "/usr/lib/libcudnn_graph.so.9"]), (90800, wheel)):
        with_cudnn, without = (cudnn_finding(k, version, "9.19.0.56", libraries) for k in ("cudnn", "flash_attn_4"))
        assert not with_cudnn.ok and without.ok and without.warning
    assert (
        "/usr/lib/libcudnn_graph.so.9" in cudnn_finding("x", 91900, "9.19.0.56", ["/usr/lib/libcudnn_graph.so.9"]).words
    )
    assert cudnn_finding("math", None, None, []).words == "not used"


def test_host_memory_counts_what_the_plan_keeps_there() -> None:
    on_host = LayerKeep("host", "host", 1.0)
    rows = 2**20 // 8
    whole = 32 * rows * (4096 * 2 + 4096 * 2 + 32 * 4)
    assert kept_host_bytes(LLAMA, plan(8, keep=(on_host,) * 32)) == whole
    assert kept_host_bytes(LLAMA, plan(4, 2, keep=(on_host,) * 32)) == whole
    half = (LayerKeep("device", "host", 0.5),) * 32
    assert kept_host_bytes(LLAMA, plan(8, keep=half)) == 32 * rows * (4096 * 2 + 32 * 4) // 2
    assert kept_host_bytes(LLAMA, plan(8, keep=(LayerKeep(),) * 32)) == 0
    refused = host_memory_finding(LLAMA, plan(8, keep=(on_host,) * 32), 8, 512 * 2**30)
    assert not refused.ok and "8 ranks of this host keep 516.0 GiB, 512.0 GiB are free" in refused.words
    assert "lower pretrain.keep_attention_rows" in refused.words
    assert host_memory_finding(LLAMA, plan(8, keep=(on_host,) * 32), 8, 521 * 2**30).ok
    assert host_memory_finding(LLAMA, plan(8), 8, 0).ok


def test_free_memory_is_that_of_the_tightest_limit() -> None:
    meminfo = "MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:    80 kB\n"
    assert free_bytes(meminfo, []) == 80 * 1024
    limited = ("40960\n", "30720\n", "anon 1\ninactive_file 4096\n")
    assert free_bytes(meminfo, [limited, (None, None, None)]) == 40960 - 30720 + 4096
    assert free_bytes(meminfo, [("max\n", "30720\n", None), ("9223372036854771712", "5", None)]) == 80 * 1024
    assert 0 < available_host_bytes() < 2**50
    # a machine that is to grow to 200 kB, and one that the recipe thinks smaller than it is
    assert (free_bytes(meminfo, [], 200 * 1024), free_bytes(meminfo, [], 50 * 1024)) == (180 * 1024, 80 * 1024)
    assert free_bytes(meminfo, [limited], 200 * 1024) == 40960 - 30720 + 4096, "a limit is a limit"
    assert any("libc" in path for path in loaded_libraries("libc"))


def test_a_link_below_its_floor_names_where_to_look() -> None:
    assert slow_link(250.0, one_host=True) is None and slow_link(20.0, one_host=False) is None
    assert "NVLink" in str(slow_link(20.0, one_host=True))
    assert "NCCL_SOCKET_IFNAME" in str(slow_link(1.0, one_host=False))


def test_a_lost_rope_change_is_noticed() -> None:
    asked = RopeConfig(scheme="llama3", factor=128.0)
    extended = {"rope_parameters": to_hf(asked, 128, 5e5, 8192)}
    stretched = torch.tensor(inv_freq(asked, 128, 5e5, 8192)).float()
    assert rope_finding(stretched, extended, asked).ok
    as_it_was = torch.tensor(inv_freq(RopeConfig(scheme="llama3", factor=8.0), 128, 5e5, 8192)).float()
    assert "off by" in rope_finding(as_it_was, extended, asked).words
    assert not rope_finding(stretched.bfloat16(), extended, asked).ok
    assert not rope_finding(stretched * float("nan"), extended, asked).ok
    never_extended = {"rope_parameters": to_hf(RopeConfig(scheme="llama3", factor=8.0), 128, 5e5, 8192)}
    refused = rope_finding(as_it_was, never_extended, asked)
    assert not refused.ok and "has llama3 with factor 8, the recipe asks for llama3 with factor 128" in refused.words


def test_the_first_loss_of_a_broken_model_is_refused() -> None:
    check_first_loss(2.1, 128256, pretrained=True)
    check_first_loss(12.7, 128256, pretrained=True)
    for loss in (12.8, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"guessing among 128256 tokens has 11\.76"):
            check_first_loss(loss, 128256, pretrained=True)
    check_first_loss(12.8, 128256, pretrained=False)


def only_preflights(folder: Path) -> list[tuple[str, list[str], bool]]:
    """Of three runs (Ulysses 2; ring 2; one rank's check broken): what was raised, the log, and was a step taken?"""
    from ultralong_ray.train import loop

    found = []
    for degrees, broken_rank in (((2, 1), None), ((1, 2), None), ((2, 1), 1)):
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())  # type: ignore[misc]
        logger = logging.getLogger("ultralong_ray")
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        changes = {"ulysses_degree": degrees[0], "ring_degree": degrees[1], "zero_stage": 0, "loss_tile_tokens": 32}
        task = job(folder, "stage", cluster={"num_workers": 2}, attention="math", **changes)
        if torch.distributed.get_rank() == broken_rank:
            checks.kernel_finding = lambda *_: 1 / 0
        raised = ""
        try:
            assert loop.run(replace(task, preflight_only=True), CPU, lambda _: None) == 0
        except UserError as error:
            raised = str(error)
        said = [line for line in records if line.startswith("preflight")]
        found.append((raised, said, (folder / "stage" / "metrics.jsonl").exists()))
    return found


def test_preflight_alone_logs_every_check_and_one_failing_rank_stops_all(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    first_rank, second_rank = run_distributed(only_preflights, 2, tmp_path)
    for index, exchange in enumerate(("Ulysses all-to-all", "ring send and receive")):
        raised, said, trained = first_rank[index]
        assert raised == "" and not trained
        names = [line.split(": ")[1] for line in said]
        assert names == ["heads", "2^31 elements", "kernel", "cuDNN", "host memory", "RoPE", exchange]
        assert f"math at {32 // (index + 1)} tokens, " in said[2] and "GB/s a rank" in said[6]
        assert second_rank[index] == ("", [], False)
    failure = "preflight failed\n  kernel, rank 1: ZeroDivisionError: division by zero"
    assert [rank[2][0] for rank in (first_rank, second_rank)] == [failure, failure]
    assert any("kernel (rank 1): ZeroDivisionError" in line for line in first_rank[2][1])


def test_the_shape_of_a_run_comes_from_config_json() -> None:
    shape = RunShape.of("sft", ARCHITECTURE, 64, 2, torch.bfloat16)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.num_layers) == (4, 2, 8, 2)
    assert RunShape.of("sft", {**ARCHITECTURE, "head_dim": 16}, 64, 2, torch.bfloat16).head_dim == 16
