"""Refusals: that they are true, that they name what is missing, and that every proposal really fits."""

from __future__ import annotations

import re
from typing import Literal

import pytest

from tests.planner.shapes import llama_recipe
from ultralong_ray.planner.choose import fastest
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.planner.plan import plan_training
from ultralong_ray.planner.predict import predict_work
from ultralong_ray.planner.refuse import PlanRefused


def refused(tag: str, cluster: str, *overrides: str, host_gib: float | None = None) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        plan_training(llama_recipe(tag, *overrides), "pretrain", parse_cluster(cluster, host_gib))
    return caught.value


CASES = [
    ("4m", "4xH200", (), None, "GiB of host memory per node"),
    ("2m", "8xH100", ("pretrain.keep_inputs=device", "pretrain.keep_attention=device"), None, "a GPU needs"),
    ("1m", "8xH100", ("pretrain.keep_inputs=host",), 128.0, "GiB of host memory per node"),
    ("2m", "2xH100", (), None, "a GPU needs"),
    ("4m", "8xH100", ("pretrain.keep_attention_rows=1",), None, "GiB of host memory per node"),
    ("1m", "8xH100", ("pretrain.gradient_checkpointing=false",), None, "a GPU needs"),
]


@pytest.mark.parametrize(("tag", "cluster", "overrides", "host_gib", "words"), CASES)
def test_every_proposal_fits_and_the_refused_one_does_not(
    tag: str, cluster: str, overrides: tuple[str, ...], host_gib: float | None, words: str
) -> None:
    refusal = refused(tag, cluster, *overrides, host_gib=host_gib)
    assert words in str(refusal)
    assert refusal.proposals
    for proposal in refusal.proposals:
        again = predict_work(proposal.best.work)
        assert again.memory.gib <= 0.95 * proposal.hardware.gpu.memory_gib
        assert again.memory.host_node_gib <= 0.9 * proposal.hardware.host_memory_gib_per_node
        assert proposal.words in str(refusal)
        assert fastest(proposal.section, proposal.hardware) is not None
    assert f"the smallest change that fits: {refusal.proposals[0].words}" in str(refusal)


SEVENTY_B = tuple(
    f"model.architecture.{field}"
    for field in (
        "hidden_size=8192",
        "intermediate_size=28672",
        "num_hidden_layers=80",
        "num_attention_heads=64",
    )
)
NINE = "pretrain.global_batch_sequences = 9 (it is 8) with cluster.num_workers = 12"
ODD = [
    # GPUs in threes share no batch of 8 or 4: the fewest GPUs more that do, even if not a multiple; tokens that groups
    # of three can split; another batch
    ("1m", "3xH200", "pretrain", (), ("4 GPUs",)),
    ("1m", "7xH100", "pretrain", (), ("8 GPUs",)),
    (
        "1m",
        "12xH100",
        "pretrain",
        ("sft.global_batch_sequences=144",),
        ("16 GPUs", "prepare.sequence_length = 1048560", NINE),
    ),
    (
        "2m",
        "3x8xH100",
        "pretrain",
        ("sft.global_batch_sequences=96",),
        ("32 GPUs", "prepare.sequence_length = 2097120", "pretrain.global_batch_sequences = 3"),
    ),
    ("1m", "2x3xH200", "sft", ("pretrain.global_batch_sequences=6",), ("sft.global_batch_sequences = 129",)),
    # what trains the same is given up before anything that does not
    ("1m", "16xH100", "pretrain", (*SEVENTY_B, "pretrain.zero_stage=1"), ("pretrain.zero_stage = 3",)),
    ("1m", "2xH100", "pretrain", ("pretrain.micro_batch_sequences=4",), ("pretrain.micro_batch_sequences = 1",)),
    # a sample is never cut, so its limit follows the sequence
    (
        "1m",
        "1xH100",
        "sft",
        ("sft.sequence_length=262144", "sft.max_sample_tokens=262144", "sft.micro_batch_sequences=2"),
        ("sft.micro_batch_sequences = 1",),
    ),
    (
        "1m",
        "1xH100",
        "sft",
        ("sft.sequence_length=786432", "sft.max_sample_tokens=700000"),
        ("2 GPUs", "sft.sequence_length = 442368 and sft.max_sample_tokens = 442368"),
    ),
]


@pytest.mark.parametrize(("tag", "cluster", "section", "overrides", "words"), ODD)
def test_the_changes_proposed_are_accepted_by_the_recipe(
    tag: str, cluster: str, section: Literal["pretrain", "sft"], overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(PlanRefused) as caught:
        plan_training(llama_recipe(tag, *overrides), section, parse_cluster(cluster))
    said = [proposal.words for proposal in caught.value.proposals]
    assert [found[: len(word)] for found, word in zip(said, words, strict=False)] == list(words), said
    for proposal in caught.value.proposals:
        fields = [f"{name}={value}" for name, value in re.findall(r"([a-z_]+\.[a-z_]+) = (\w+)", proposal.words)]
        plan_training(llama_recipe(tag, *overrides, *fields), section, proposal.hardware)


def test_given_fields_are_named_and_let_go_first() -> None:
    refusal = refused("2m", "8xH100", "pretrain.keep_inputs=device", "pretrain.keep_attention_rows=1")
    text = str(refusal)
    assert 'given: pretrain.keep_inputs = "device", pretrain.keep_attention_rows = 1.0' in text
    assert refusal.proposals[0].words.startswith("pretrain.keep_")
    assert refusal.proposals[0].best.fits


def test_the_host_memory_proposed_is_the_least() -> None:
    refusal = refused("4m", "4xH200")
    larger = refusal.proposals[0].hardware
    assert "GiB of host memory per node instead of 1,024" in refusal.proposals[0].words
    less = parse_cluster("4xH200", larger.host_memory_gib_per_node - 32)
    assert fastest(refusal.proposals[0].section, less) is None


@pytest.mark.parametrize(
    ("length", "proposed"),
    [
        (3_000_004, 2_625_000),  # 14 sixteenths are 2,625,003, which suit one rank alone
        (2_500_001, 2_500_000),  # one token less suits all degrees
    ],
)
def test_the_length_proposed_is_one_that_all_degrees_can_split(length: int, proposed: int) -> None:
    workers = ("cluster.num_workers=4", "pretrain.global_batch_sequences=4")
    refusal = refused("4m", "4xH100", f"prepare.sequence_length={length}", *workers)
    proposal = next(p for p in refusal.proposals if "prepare.sequence_length" in p.words)
    assert proposal.words == f"prepare.sequence_length = {proposed}"
    assert proposal.section.sequence_length == proposed and proposal.best.fits


def test_the_gpus_proposed_are_the_fewest() -> None:
    refusal = refused("4m", "2xH100")
    proposal = next(p for p in refusal.proposals if "cluster.num_workers" in p.words)
    assert proposal.hardware.num_gpus == 8  # 4 are tried before
    assert fastest(proposal.section, parse_cluster("4xH100")) is None


@pytest.mark.parametrize(
    ("tag", "cluster", "override", "words"),
    [
        ("1m", "6xH100", "pretrain.sequence_parallel_degree=4", "sequence_parallel_degree 4 does not divide 6 workers"),
        ("4m", "8xH100", "pretrain.sequence_parallel_degree=2", "global_batch_sequences 2 is not a multiple of 4"),
        ("4m", "8xH100", "pretrain.ulysses_degree=3", "no Ulysses x ring degrees suit 8 workers"),
    ],
)
def test_degrees_that_do_not_suit_the_cluster(tag: str, cluster: str, override: str, words: str) -> None:
    # On 32 workers the recipe itself is legal; the cluster asked about is another.
    recipe = llama_recipe(tag)
    field, value = override.removeprefix("pretrain.").split("=")
    train = recipe.pretrain.model_copy(update={field: int(value)})
    with pytest.raises(PlanRefused, match=words):
        plan_training(recipe.model_copy(update={"pretrain": train}), "pretrain", parse_cluster(cluster))


def test_a_layout_given_to_the_last_field_can_still_be_run() -> None:
    fields = (
        "sequence_parallel_degree=8",
        "ulysses_degree=8",
        "keep_inputs=device",
        "keep_attention=device",
        "keep_attention_rows=1",
        "offload_optimizer=false",
        "mlp_tile_tokens=4096",
        "loss_tile_tokens=512",
    )
    refusal = refused("1m", "8xH100", *(f"pretrain.{field}" for field in fields))
    assert refusal.forced is not None and refusal.forced.ulysses_degree == 8
    assert len(refusal.forced.keep) == 32 and refusal.forced.mlp_tile_tokens == 4096
    assert refused("1m", "8xH100", *(f"pretrain.{field}" for field in fields[:-1])).forced is None
