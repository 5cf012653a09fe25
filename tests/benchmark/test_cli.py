"""The command line: setups, presets, and mistakes in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultralong_ray.benchmark import presets, run
from ultralong_ray.benchmark.cli import benchmark_of, main, parse
from ultralong_ray.benchmark.launch import RunFailed
from ultralong_ray.flops import ModelShape
from ultralong_ray.planner.hardware import cluster_of
from ultralong_ray.planner.predict import predict
from ultralong_ray.types import LayerKeep

OUT = ["--out", "x.json"]
PRESETS = [
    *("128k", "512k", "512k-8", "1m", "1m-whole", "2m-whole", "4m-layer", "degrees-256k", "degrees-1m", "ring-256k"),
    *("keep-512k", "rows-512k", "sweep"),
]


def test_the_command_of_the_documentation() -> None:
    words = "train --shape llama31_8b --layers 8 --length 524288 --gpus 4 --ulysses 2 --ring 2 --keep host --rows 0.5"
    benchmark = benchmark_of(parse([*words.split(), "--peers", "alst,torch_cp", "--peer-layers", "4", *OUT]))
    (setup,) = benchmark.setups
    assert (setup.length, setup.layers, setup.ulysses, setup.ring) == (524288, 8, 2, 2)
    assert setup.plan.keep == (LayerKeep("host", "host", 0.5),) * 8
    assert benchmark.peers == ("alst", "torch_cp")
    peer = benchmark.peer_setup
    assert (peer.layers, peer.length, peer.plan.degree) == (4, 524288, 4)
    assert benchmark.config(8)["num_hidden_layers"] == 8


def test_degrees_by_default_are_ulysses_as_far_as_heads_go() -> None:
    def degrees(*words: str) -> tuple[int, int]:
        setup = benchmark_of(parse(["train", *words, *OUT])).setups[0]
        return setup.ulysses, setup.ring

    assert degrees("--gpus", "8") == (8, 1)
    assert degrees("--gpus", "64") == (32, 2)
    assert degrees("--gpus", "8", "--ring", "4") == (2, 4)
    assert degrees("--gpus", "8", "--shape", "tiny") == (4, 2)


def test_ranks_that_share_gpus_reach_degrees_beyond_them() -> None:
    shared = ["train", "--gpus", "2", "--ranks-per-gpu", "2"]
    benchmark = benchmark_of(parse([*shared, "--compare-degrees", "4x1,1x4,2x2", *OUT]))
    benchmark.check()
    assert (benchmark.num_gpus, benchmark.num_ranks) == (2, 4)
    assert benchmark_of(parse([*shared, "--long", "4096", *OUT])).setups[0].ulysses == 4


def test_more_setups() -> None:
    words = ["train", "--gpus", "4", "--also", "keep=host,rows=0.5", "--also", "degrees=1x4,length=65536"]
    first, second, third = benchmark_of(parse([*words, *OUT])).setups
    assert (second.keep, second.rows, second.length) == ("host", 0.5, first.length)
    assert (third.ulysses, third.ring, third.length, third.keep) == (1, 4, 65536, "device")


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_commands_that_can_run(name: str, gpus: int) -> None:
    benchmark = benchmark_of(parse(["train", "--preset", name, "--gpus", str(gpus), *OUT]))
    benchmark.check()
    assert all(setup.plan.degree == gpus for setup in benchmark.setups)
    assert len(benchmark.setups) > 1 or name in ("128k", "512k", "512k-8", "1m", "1m-whole", "2m-whole", "4m-layer")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_eight_h200_on_a_host_of_560_gib(name: str) -> None:
    hardware = cluster_of("H200", 8, host_memory_gib_per_node=560)
    benchmark = benchmark_of(parse(["train", "--preset", name, "--gpus", "8", *OUT]))
    for setup in benchmark.setups:
        shape = ModelShape.from_config(benchmark.config(setup.layers))
        memory = predict(shape, setup.length, setup.plan, hardware).memory
        assert memory.gib < 0.9 * hardware.gpu.memory_gib, setup  # reserved was a tenth above allocated
        assert memory.host_node_gib < 0.9 * 560, setup


def test_the_last_layers_keep_on_the_device() -> None:
    words = "train --layers 4 --keep host --rows 0.5 --device-layers 3"
    (setup,) = benchmark_of(parse([*words.split(), *OUT])).setups
    assert setup.plan.keep == (LayerKeep("host", "host", 0.5), *[LayerKeep("device", "device", 0.5)] * 3)
    assert setup.changed("device_layers=4").plan.keep == (LayerKeep("device", "device", 0.5),) * 4


def test_the_command_line_overrules_a_preset() -> None:
    benchmark = benchmark_of(parse(["train", "--preset", "1m", "--gpus", "4", "--layers", "3", "--steps", "2", *OUT]))
    assert (benchmark.setups[0].layers, benchmark.setups[0].length, benchmark.steps) == (3, 2**20, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape gpt2", "--shape gpt2: no such shape; there are llama31_8b, llama32_1b, quickstart, tiny"),
        ("--peers alst,nemo", "--peers nemo: no such peer"),
        ("--gpus 4 --ulysses 3", "degrees 3x1 do not divide --gpus 4"),
        ("--gpus 64 --ulysses 64", "cannot split the 32 query and 8 key-value heads"),
        ("--gpus 4 --ring 4 --length 131076", "131076"),
        ("--also rows=2", "rows='2' is not a share between 0 and 1"),
        ("--also depth=2", "'depth=2': no such field of a setup"),
        ("--also degrees=2", "is not a positive integer"),
        ("--long 4194304 --layers 2", "give --layers 1"),
        ("--layers 2 --keep host --device-layers 3", "--device-layers 3: the model has 2 layers"),
        ("--gpus 4 --warmup-length 4098", "sequence length 4098 is not divisible by"),
        ("--warmup-length 4096 --peers alst", "compared with no peer's"),
        ("--preset 64k", "--preset 64k: no such preset; there are 128k"),
        ("--gpus 4 --compare-degrees 4x1,1x2", "of one length, depth and total degree"),
        ("--gpus 2 --ranks-per-gpu 2 --compare-degrees 3x1", "do not divide --gpus 2 x --ranks-per-gpu 2"),
        ("--gpus 2 --ranks-per-gpu 2", "times of ranks that share a GPU mean nothing"),
        ("--gpus 2 --ranks-per-gpu 2 --compare-degrees 4x1,2x2 --peers alst", "without --peers"),
    ],
)
def test_mistakes_get_words(words: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", *words.split(), "--out", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


MODEL = "--model jobs/models/tiny-512"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --gpus 0", "argument --gpus: '0' is not a positive integer"),
        ("train --length -4", "argument --length: '-4' is not a positive integer"),
        ("train --layers -1", "argument --layers: '-1' is not a positive integer"),
        ("train --steps 0", "argument --steps: '0' is not a positive integer"),
        ("train --warmup -1", "argument --warmup: '-1' is not an integer from 0 on"),
        ("train --rows 2", "argument --rows: '2' is not a share between 0 and 1"),
        ("checkpoint --target x --every 0", "argument --every: '0' is not a positive integer"),
        ("checkpoint --target x --preset 128k", "unrecognized arguments: --preset 128k"),
        ("prefill --decode 0", "argument --decode: '0' is not a positive integer"),
        ("prefill --prefill-chunk 0", "argument --prefill-chunk: '0' is not a positive integer"),
        (f"parity {MODEL} --prompts 0", "argument --prompts: '0' is not a positive integer"),
        (f"prefix {MODEL} --depths 0", "argument --depths: '0' is not a positive integer"),
        (f"prefix {MODEL} --device gpu", "argument --device: invalid choice: 'gpu'"),
    ],
)
def test_numbers_that_cannot_be_are_refused_at_once(
    words: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), "--out", str(tmp_path / "x.json")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --out {0}", "is a folder; name a JSON file"),
        ("train --out {0}/file/x.json", "cannot be written"),
        ("prefix --model {0} --out {0}/x.json", "no config.json there"),
        ("parity --model {0} --out {0}/x.json", "no config.json there"),
        ("checkpoint --target {0}/t --steps 2 --every 3 --out {0}/x.json", "--every 3 is above --steps 2"),
        ("data --corpus {0} --tokenizer jobs/models/tiny-512", "no Parquet file there with text"),
    ],
)
def test_places_that_cannot_be_used_are_named(
    words: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(words.format(tmp_path).split()) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("words", "module"), [("--long 64", "long_check"), ("--length 64", "ours")])
def test_a_long_layer_has_a_worker_of_its_own(
    words: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def run_ranks(module: str, *_: object) -> None:
        asked.append(module)
        raise RunFailed("far enough")

    monkeypatch.setattr(run, "run_ranks", run_ranks)
    command = ["train", *words.split(), "--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "x.json")]
    assert main(command) == 1
    assert asked == [f"ultralong_ray.benchmark.{module}"]


def test_a_range_of_layers_may_be_set_back_to_none() -> None:
    words = ["train", "--layers", "4", "--keep", "host", "--device-layers", "2", "--also", "device_layers=0", *OUT]
    assert [setup.device_layers for setup in benchmark_of(parse(words)).setups] == [2, 0]


def test_presets_name_what_there_is() -> None:
    assert presets.arguments("ring-256k", 4).count("--also") == 2


def test_the_other_verb_has_arguments_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data", "--help"])
    assert "--datatrove-python" in capsys.readouterr().out
