"""What a stage waits for, when waiting cannot help, and what is said."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from ultralong_ray import nodes
from ultralong_ray.config import Recipe
from ultralong_ray.nodes import Demand, Node, View, demand_of, silent_head, why_never

TRAIN = {"ultralong-group": "train"}
DEMAND = Demand("pretrain", 4, {"CPU": 1, "GPU": 1}, TRAIN)


def node(gpus: float = 2, used: float = 0, group: str = "train", labels: dict[str, str] = TRAIN) -> Node:
    total = {"CPU": 16.0, "GPU": gpus, "memory": 1.0}
    return Node(group, labels, total, {**total, "GPU": gpus - used})


def view(*nodes: Node, starting: int = 0, refused: bool = False) -> View:
    return View(nodes, {"train": starting} if starting else {}, (), refused)


HEAD = Node("head", {}, {"memory": 1.0}, {"memory": 1.0})
HEAD_BY_HAND = Node("", {}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 8.0})


def test_each_stage_asks_for_its_own_nodes(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(
        cluster={"node_groups": True, "num_workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 2},
        pretrain={"global_batch_sequences": 8},
        sft={"global_batch_sequences": 8},
        evaluate={"gpus_per_task": 0.5},
    )
    asked = {
        stage: demand_of(recipe, stage) for stage in ("prepare", "pretrain", "sft", "evaluate", "extend", "report")
    }
    assert asked["pretrain"] == Demand("pretrain", 8, {"CPU": 2, "GPU": 1}, TRAIN)
    assert asked["sft"] == Demand("sft", 8, {"CPU": 2, "GPU": 1}, TRAIN)
    assert asked["evaluate"] == Demand("evaluate", 1, {"CPU": 1, "GPU": 0.5}, {"ultralong-group": "eval"})
    assert asked["prepare"] is not None and asked["prepare"].label["ultralong-group"] == "data"
    assert asked["extend"] is None and asked["report"] is None
    anywhere = demand_of(tiny_recipe(), "pretrain")
    assert anywhere is not None and anywhere.label == {} and anywhere.bundle == {"CPU": 1}


def test_nodes_that_others_use_come_free_again() -> None:
    assert why_never(DEMAND, view(HEAD, node(used=2), node(used=1))) is None
    assert why_never(DEMAND, view(HEAD_BY_HAND, node(used=2, group=""), node(group=""))) is None
    # an autoscaler refuses while another job has some of its nodes: it says nothing about later
    assert why_never(DEMAND, view(HEAD, node(used=1), refused=True)) is None


def test_nodes_on_their_way_are_waited_for() -> None:
    assert why_never(DEMAND, view(HEAD)) is None
    assert why_never(DEMAND, view(HEAD, node(), starting=1, refused=True)) is None


def test_what_no_group_can_hold_is_never() -> None:
    assert "no group of nodes" in (why_never(DEMAND, view(HEAD, refused=True)) or "")
    assert "no group of nodes" in (why_never(DEMAND, view(HEAD, node(), refused=True)) or "")


def test_without_an_autoscaler_what_is_there_is_all() -> None:
    assert "no autoscaler runs" in (why_never(DEMAND, view(HEAD_BY_HAND)) or "")  # enough GPUs, none labelled
    assert "no autoscaler runs" in (why_never(DEMAND, view(HEAD_BY_HAND, node(3, 1, group=""))) or "")
    assert why_never(DEMAND, view(HEAD_BY_HAND, node(3, group=""), node(1, group=""))) is None
    # a bundle is not split: 2 + 2 GPUs hold no worker of 3
    wide = Demand("pretrain", 1, {"GPU": 3}, TRAIN)
    assert why_never(wide, view(HEAD_BY_HAND, node(group=""), node(group=""))) is not None


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (str(DEMAND), "4 x {CPU 1, GPU 1} on nodes labelled ultralong-group=train"),
        (
            str(view(HEAD, node(used=1), node(), node(), starting=2)),
            "1 x head {}, 1 x train {CPU 16, GPU 2} in use, 2 x train {CPU 16, GPU 2}, 2 x train starting",
        ),
        (str(View((), {}, ("train could not be started: no quota",), False)), "train could not be started: no quota"),
    ],
)
def test_words(shown: str, words: str) -> None:
    assert shown == words


def test_a_head_that_answers_and_one_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "HEAD_SECONDS", 0.6)
    with socket.create_server(("", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert silent_head() is None
    silent = silent_head()
    assert silent is not None and silent.endswith(f":{port}")


@pytest.mark.parametrize("address", ["local", "ray://127.0.0.1:1"])
def test_no_head_is_looked_for_where_ray_does_not_join_one(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert silent_head() is None
