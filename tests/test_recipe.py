"""Recipes: what is refused and how it is said, overrides, and the published values of the 8B recipes."""

import tomllib
from pathlib import Path

import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.config.made_tasks import RulerTask
from ultralong_ray.config.read_tasks import PerplexityTask
from ultralong_ray.plan import describe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.types import UserError

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
QUICKSTART = str(RECIPES / "quickstart.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem


@pytest.mark.parametrize("path", sorted((RECIPES / "reproduction").glob("*.toml")), ids=lambda p: p.stem)
def test_the_reproduction_asks_the_same_on_every_machine_and_day(path: Path):
    """RULER's words do not depend on what is installed, nor documents on how the project goes on."""
    evaluate = load_recipe(str(path)).evaluate
    tasks = () if evaluate is None else evaluate.tasks
    assert all(task.words == "built in" for task in tasks if isinstance(task, RulerTask))
    documents = [place for task in tasks if isinstance(task, PerplexityTask) for place in task.documents]
    assert set(documents) <= {"jobs/recipes/reproduction/code.jsonl"}
    assert not any(name == "words" for task in tasks for name, _ in task.paths()), "a name is no file"


@pytest.mark.parametrize(
    ("tag", "factor", "window", "max_positions", "iterations", "batch"),
    [
        ("1m", 128, 1_048_576, 1_073_152, 125, 8),
        ("2m", 256, 2_097_152, 2_146_304, 140, 4),
        ("4m", 512, 4_194_304, 4_292_608, 150, 2),
    ],
)
def test_published_values(tag: str, factor: int, window: int, max_positions: int, iterations: int, batch: int):
    recipe = load_recipe(str(RECIPES / f"llama31_8b_{tag}.toml"), ["--workdir", "/nowhere"])
    assert recipe.model.rope.scheme == "llama3"
    assert recipe.model.rope.factor == factor == window / recipe.model.original_context_length
    assert (recipe.model.rope.low_freq_factor, recipe.model.rope.high_freq_factor) == (1, 4)
    assert recipe.model.target_context_length == recipe.prepare.sequence_length == window
    assert recipe.model.exported_max_position_embeddings == max_positions
    assert recipe.pretrain.learning_rate == 3e-5
    assert not recipe.pretrain.mask_documents
    assert recipe.prepare.separator == "<s>"
    assert recipe.prepare.token_budget == 10**9
    assert (recipe.pretrain.steps, recipe.pretrain.global_batch_sequences) == (iterations, batch)
    assert recipe.sft is not None
    assert (recipe.sft.num_samples, recipe.sft.global_batch_sequences) == (100_000, 128)
    assert (recipe.sft.learning_rate, recipe.sft.max_sample_tokens) == (5e-6, 8192)
    plan = describe(recipe)
    for fact in (
        f"s = {factor} ",
        "learning rate 3e-05",
        "separator '<s>'",
        "(1B)",
        f"{iterations} iterations x batch",
    ):
        assert fact in plan


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["--pretrain.learning_rate", "-1"], ["pretrain.learning_rate", "-1", "greater than 0"]),
        (["--pretrain.lerning_rate", "1"], ["lerning_rate"]),
        (["--prepare.sequence_length", "8192"], ["8192", "4096", "target_context_length"]),
        (
            ["--prepare.sequence_length", "4095", "--prepare.token_budget", "327600"],
            ["4095", "sequence_parallel_degree 2", "4094", "4096"],
        ),
        (["--pretrain.sequence_parallel_degree", "3"], ["num_workers 2", "sequence_parallel_degree 3"]),
        (["--pretrain.ring_degree", "4"], ["ring_degree 4", "does not multiply", "sequence_parallel_degree 2"]),
        (["--sft.ring_degree", "2"], ["documents cannot be masked with ring_degree 2", "use ulysses_degree"]),
        (["--pretrain.global_batch_sequences", "7", "--pretrain.micro_batch_sequences", "2"], ["7", "multiple of 2"]),
        (["--prepare.short_below_tokens", "2048"], ["2048", "1024"]),
        (["--prepare.long_repeat", "9"], ["long_repeat 9", "max_repeats 4"]),
        (["--prepare.token_budget", "100"], ["100", "4096"]),
        (["--model.rope.factor", "0.5"], ["0.5", "shrink"]),
        (["--model.rope.low_freq_factor", "5"], ["5", "below"]),
        (["--model.target_context_length", "256"], ["256", "512"]),
        (["--sft.max_sample_tokens", "2048"], ["2048", "1024", "never cut"]),
        (["--prepare.separator", "</s>"], ["prepare.separator", "</s>"]),
        (["--prepare.seed", "-1"], ["prepare.seed", "-1", "greater than or equal to 0"]),
        (["--pretrain.seed", "-1"], ["pretrain.seed", "-1", "greater than or equal to 0"]),
        (["--sft.seed", "-1"], ["sft.seed", "-1", "greater than or equal to 0"]),
        (["--prepare.token_budget", "1" + 30 * "0"], ["prepare.token_budget", "less than or equal to"]),
        (["--prepare.domain_mix", "{}"], ["prepare.domain_mix", "at least 1"]),
        (["--prepare.domain_mix", '{"code": Infinity}'], ["prepare.domain_mix", "finite"]),
        (["--pretrain.learning_rate", "inf"], ["pretrain.learning_rate", "finite"]),
        (["--model.rope.factor", "1e400"], ["model.rope.factor", "finite"]),
        (["--pretrain.keep_attention_rows", "2"], ["  pretrain.keep_attention_rows = 2: "]),
        (["--evaluate.engine", '{"batch_tokens": 0}'], ["  evaluate.engine.batch_tokens = 0: "]),
        (["--workdir", ""], ["workdir", "at least 1"]),
        (["--corpus.sources.0.text_column", ""], ["text_column", "at least 1"]),
    ],
)
def test_contradictions_are_refused_with_numbers(overrides: list[str], facts: list[str]):
    with pytest.raises(UserError) as refusal:
        load_recipe(QUICKSTART, overrides)
    for fact in facts:
        assert fact in str(refusal.value)


def test_an_item_that_is_wrong_is_one_fault_and_an_empty_list_is_another():
    with pytest.raises(UserError) as refusal:
        load_recipe(QUICKSTART, ["--evaluate.models", '["finall"]'])
    assert len(str(refusal.value).splitlines()) == 2 and "evaluate.models.0 = 'finall'" in str(refusal.value)
    with pytest.raises(UserError, match=r"evaluate.models = \[\]: Tuple should have at least 1 item"):
        load_recipe(QUICKSTART, ["--evaluate.models", "[]"])


def degrees(*overrides: str) -> tuple[int, int]:
    recipe = load_recipe(str(RECIPES / "llama31_8b_4m.toml"), ["--cluster.num_workers", "64", *overrides])
    return recipe.degrees(recipe.pretrain)


def test_heads_that_the_degree_cannot_split_name_the_degrees_that_can():
    with pytest.raises(UserError, match=r"ulysses_degree 64 cannot split 32 query heads.*1, 2, 4, 8, 16, 32"):
        degrees("--pretrain.sequence_parallel_degree", "64", "--pretrain.ulysses_degree", "64")


def test_auto_degrees_take_all_workers_and_a_ring_beyond_the_heads():
    assert degrees("--pretrain.sequence_parallel_degree", "auto") == (32, 2)
    assert degrees("--pretrain.sequence_parallel_degree", "64", "--pretrain.ring_degree", "8") == (8, 8)
    assert degrees("--pretrain.sequence_parallel_degree", "32", "--pretrain.ulysses_degree", "2") == (2, 16)


def test_a_degree_without_the_total_is_the_total():
    file = Path(QUICKSTART).read_text().replace("sequence_parallel_degree = 2", "ring_degree = 2", 1)
    assert "ring_degree = 2" in file
    recipe = Recipe.model_validate(tomllib.loads(file))
    assert recipe.degrees(recipe.pretrain) == (1, 2)
    assert recipe.sft is not None and recipe.degrees(recipe.sft) == (2, 1)


def test_unknown_key_in_the_file(tmp_path: Path):
    file = tmp_path / "bad.toml"
    file.write_text(Path(QUICKSTART).read_text().replace("token_budget", "tokens_budget"))
    with pytest.raises(UserError, match=r"prepare\.tokens_budget.*unknown key"):
        load_recipe(str(file))


def test_broken_toml_and_absent_file(tmp_path: Path):
    file = tmp_path / "bad.toml"
    file.write_text("name = \n")
    with pytest.raises(UserError, match="no valid TOML"):
        load_recipe(str(file))
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(str(tmp_path / "absent.toml"))


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"quickstart.toml cannot be read \(Permission denied\)"):
        load_recipe(QUICKSTART)


def test_overrides_reach_nested_keys_in_both_spellings():
    recipe = load_recipe(QUICKSTART, ["--pretrain.learning_rate", "2e-4", "model.rope.factor=32", "--prepare.seed=7"])
    assert recipe.pretrain.learning_rate == 2e-4
    assert recipe.model.rope.factor == 32
    assert recipe.model.rope.high_freq_factor == 4
    assert recipe.prepare.seed == 7


def test_overrides_reach_into_lists_and_take_null_and_tables():
    recipe = load_recipe(
        QUICKSTART,
        ["corpus.sources.0.max_megabytes=3", "--prepare.domain_mix", '{"code": 1, "legal": 3}', "--sft", "null"],
    )
    assert recipe.corpus.sources[0].max_megabytes == 3
    assert recipe.prepare.domain_mix == {"code": 1, "legal": 3}
    assert recipe.sft is None
    assert load_recipe(QUICKSTART, ["--prepare.domain_mix", "null"]).prepare.domain_mix is None
    assert load_recipe(QUICKSTART, ["--model.rope", "{ scheme = 'ntk', factor = 4 }"]).model.rope.scheme == "ntk"


@pytest.mark.parametrize(
    "argument",
    [
        "--pretrain.seed",
        "pretrain.seed",
        "corpus.sources.5.uri=x",
        "corpus.sources.\N{SUPERSCRIPT TWO}.uri=x",
        "evaluate.context_lengths.0.x=5",
    ],
)
def test_overrides_that_say_nothing_are_refused(argument: str):
    with pytest.raises(UserError, match=r"override .*(not understood|no position in a list of 1|256, which has no k)"):
        load_recipe(QUICKSTART, [argument])
