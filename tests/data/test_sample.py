"""Length upsampling: budgets to the token, the mix, the keep and repeat rules, refusals; all from hashes alone."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.data.columns import lengths_of, place_rows
from ultralong_ray.config import PrepareConfig
from ultralong_ray.data.pack import Separators, plan_concatenated
from ultralong_ray.data.sample import Copies, Lengths, choose_holdout, draw, sample, target_shares, unit_hash
from ultralong_ray.data.token_shards import id_hash
from ultralong_ray.types import UserError


class Row(NamedTuple):
    id: str
    domain: str
    num_tokens: int


class Sampled(NamedTuple):
    id: str
    domain: str
    copy: int
    num_tokens: int


def config(**fields: Any) -> PrepareConfig:
    defaults = {"sequence_length": 1000, "token_budget": 40_000, "short_below_tokens": 100, "long_above_tokens": 400}
    return PrepareConfig(**{**defaults, **fields})


def corpus(seed: int = 0, documents: int = 900) -> list[Row]:
    rng = random.Random(seed)
    domains = rng.choices(["code", "books", "web"], [5, 2, 3], k=documents)
    return [Row(f"{d}-{i}", d, int(rng.lognormvariate(5, 1.2)) + 1) for i, d in enumerate(domains)]


def named(rows: list[Row], copies: Copies) -> list[Sampled]:
    columns = zip(copies.row.tolist(), copies.copy.tolist(), copies.num_tokens.tolist(), strict=True)
    return [Sampled(rows[row].id, rows[row].domain, copy, tokens) for row, copy, tokens in columns]


def sampled(rows: list[Row], settings: PrepareConfig, *separators: int, held: set[str] = frozenset()) -> list[Sampled]:  # type: ignore[assignment]
    held_out = np.flatnonzero([row.id in held for row in rows])
    return named(rows, sample(lengths_of(rows), settings, *separators, held_out=held_out))


def held(rows: list[Row], settings: PrepareConfig) -> list[Row]:
    return [rows[i] for i in choose_holdout(lengths_of(rows), settings).tolist()]


def shares(lengths: Lengths, settings: PrepareConfig) -> dict[str, float]:
    return dict(zip(map(str, lengths.groups), target_shares(lengths, settings).tolist(), strict=True))


def tokens_of(copies: list[Sampled]) -> Counter[str]:
    total: Counter[str] = Counter()
    for copy in copies:
        total[copy.domain] += copy.num_tokens
    return total


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (1, 1), (3, 7)])
@pytest.mark.parametrize("mix", [None, {"code": 1.0, "books": 2.0, "web": 1.0}, {"web": 3.0}])
def test_budget_and_mix_are_met(before: int, after: int, mix: dict[str, float] | None) -> None:
    for seed in range(8):
        # The keep rate is generous so that the budget is what ends a domain, not its last document.
        settings = config(seed=seed, domain_mix=mix, short_keep=0.5, max_repeats=8)
        documents = corpus(seed)
        copies = sampled(documents, settings, before, after)
        tokens = tokens_of(copies)
        excess = tokens.total() + len(copies) * (before + after) - 40_000
        assert -before <= excess <= after
        for domain, share in shares(lengths_of(documents), settings).items():
            assert tokens[domain] / tokens.total() == pytest.approx(share, abs=0.001)


def test_exact_fit_of_a_whole_corpus() -> None:
    documents = [Row(f"d{i}", "a", 98) for i in range(10)]
    settings = config(sequence_length=1000, token_budget=1000, short_below_tokens=0)
    assert sum(c.num_tokens for c in sampled(documents, settings, 0, 2)) == 980
    with pytest.raises(UserError, match="too small"):
        sampled(documents[:-1], settings, 0, 2)


def test_room_for_no_more_than_the_start_of_a_separator_stays_free() -> None:
    documents = [Row(f"d{i}", "a", 97) for i in range(11)]
    settings = config(sequence_length=1002, token_budget=1002, short_below_tokens=0)
    copies = sample(lengths_of(documents), settings, before_tokens=3)
    assert copies.num_tokens.tolist() == [97] * 10  # 10 x (97 + 3) leaves 2
    separators = plan_concatenated(copies, Separators(before=(1, 2, 3)), 1002, 1).separators
    assert (separators.start[-1], separators.end[-1], separators.before[-1]) == (1000, 1002, True)


@pytest.mark.parametrize("separators", [Separators(), Separators((1,), (2,)), Separators((1, 2, 3), (4, 5, 6, 7))])
def test_packing_places_every_copy_to_the_token(separators: Separators) -> None:
    for seed in range(5):
        settings = config(seed=seed, short_keep=0.5, max_repeats=8)
        copies = sample(lengths_of(corpus(seed)), settings, len(separators.before), len(separators.after))
        placed: Counter[tuple[int, int]] = Counter()
        for p in place_rows(plan_concatenated(copies, separators, 1000, 40).documents):
            placed[p[3], p[4]] += p[2] - p[1]
        columns = zip(copies.row.tolist(), copies.copy.tolist(), copies.num_tokens.tolist(), strict=True)
        assert placed == {(row, copy): tokens for row, copy, tokens in columns}


def test_short_kept_by_hash_middle_once_long_repeated() -> None:
    documents = corpus(3)
    settings = config(token_budget=10**6, short_keep=0.3, long_repeat=2, max_repeats=2)
    drawn = draw(lengths_of(documents), settings, 0)
    copies = Counter(c.id for group in drawn.groups for c in named(documents, group.copies))
    short = [d for d in documents if d.num_tokens < 100]
    kept = [d for d in short if copies[d.id]]
    place = unit_hash("keep", 42, np.array([id_hash(d.id) for d in short], np.uint64))
    assert kept == [d for d, p in zip(short, place.tolist(), strict=True) if p < 0.3]
    assert 0.2 < len(kept) / len(short) < 0.4
    assert {copies[d.id] for d in kept} == {1}
    assert {copies[d.id] for d in documents if 100 <= d.num_tokens <= 400} == {1}
    assert {copies[d.id] for d in documents if d.num_tokens > 400} == {2}


def test_repeats_rise_only_where_a_domain_lacks_tokens() -> None:
    documents = [Row(f"rich{i}", "rich", 500) for i in range(100)]
    documents += [Row(f"poor{i}", "poor", 500) for i in range(15)]
    settings = config(domain_mix={"rich": 1.0, "poor": 1.0}, max_repeats=4)
    copies: dict[str, set[int]] = defaultdict(set)
    for copy in sampled(documents, settings):
        copies[copy.domain].add(copy.copy)
    assert copies["poor"] == {0, 1, 2}  # 20,000 tokens of 7,500: three copies are needed, a fourth is not
    assert copies["rich"] <= {0, 1}
    with pytest.raises(UserError, match="too small"):
        sampled(documents, config(domain_mix={"rich": 1.0, "poor": 1.0}, max_repeats=2))


def test_too_small_a_corpus_gives_the_arithmetic() -> None:
    with pytest.raises(UserError) as error:
        sampled(corpus(), config(token_budget=10**9))
    message = str(error.value)
    for part in ("code: needs", "books: needs", "below 100", "above 400", "token_budget", "short_keep", "max_repeats"):
        assert part in message


def test_the_budget_proposed_by_the_refusal_is_met() -> None:
    with pytest.raises(UserError) as error:
        sampled(corpus(), config(token_budget=10**7))
    proposed = int(str(error.value).split("token_budget to ")[1].split(" ")[0].replace(",", ""))
    assert proposed % config().sequence_length == 0 and sampled(corpus(), config(token_budget=proposed))


def test_a_corpus_below_one_sequence_is_told_to_shorten_it() -> None:
    with pytest.raises(UserError, match=r"Lower prepare\.sequence_length and prepare\.token_budget to less than \d"):
        sampled(corpus(), config(sequence_length=10**7, token_budget=10**7))


def test_unknown_domain_is_named() -> None:
    with pytest.raises(UserError, match=r"'novels'.*books, code, web"):
        sampled(corpus(), config(domain_mix={"novels": 1.0}))


def test_depends_on_seed_and_id_alone() -> None:
    documents = corpus()
    shuffled = random.Random(1).sample(documents, len(documents))
    assert sampled(documents, config()) == sampled(shuffled, config())
    assert sampled(documents, config()) != sampled(documents, config(seed=43))


def test_domains_are_spread_over_the_stream() -> None:
    copies = sampled(corpus(documents=4000), config(token_budget=200_000))
    half = len(copies) // 2
    first, whole = tokens_of(copies[:half]), tokens_of(copies)
    for domain in whole:
        assert first[domain] / first.total() == pytest.approx(whole[domain] / whole.total(), abs=0.03)


def test_holdout_is_long_and_not_sampled() -> None:
    documents = corpus(documents=3000)
    settings = config(holdout_sequences=5)
    chosen = held(documents, settings)
    assert len(chosen) == 5 and all(d.num_tokens >= 1000 for d in chosen)
    names = {d.id for d in chosen}
    # asked for nearly all there is, every other long document must be drawn
    assert names.isdisjoint(c.id for c in sampled(documents, config(token_budget=300_000), held=names))
    assert not names.isdisjoint(c.id for c in sampled(documents, config(token_budget=300_000)))


def test_holdout_leaves_a_long_document_in_each_domain_where_it_can() -> None:
    documents = [Row(f"{d}{i}", d, 1000) for d, n in (("a", 4), ("b", 1), ("c", 2)) for i in range(n)]
    for seed in range(10):
        chosen = held(documents, config(holdout_sequences=4, seed=seed))
        assert Counter(d.domain for d in chosen) == {"a": 3, "c": 1}
    assert len(held(documents, config(holdout_sequences=7))) == 7
    with pytest.raises(UserError, match="only 7 documents"):
        held(documents, config(holdout_sequences=8))


def test_hash_is_even_and_differs_by_purpose_and_seed() -> None:
    hashes = np.array([id_hash(f"document {i}") for i in range(20_000)], np.uint64)
    place = unit_hash("order", 1, hashes)
    assert place.min() >= 0 and place.max() < 1
    counts, _ = np.histogram(place, 20, (0, 1))
    assert counts.min() > 880 and counts.max() < 1120  # 1,000 expected, 4 standard deviations are 124
    for other in (unit_hash("order", 2, hashes), unit_hash("keep", 1, hashes)):
        assert abs(np.corrcoef(place, other)[0, 1]) < 0.03
    assert unit_hash("order", 1, hashes[:1])[0] == place[0]
    assert unit_hash("order", 42, np.array([id_hash("a")], np.uint64))[0] == pytest.approx(
        0.47946879536474896, abs=1e-15
    )


def test_weights_of_sources_shift_the_mix() -> None:
    rows = [Row(f"{d}{i}", d, 200) for d in ("a", "b") for i in range(400)]
    heavy = {row.id: 3.0 for row in rows if int(row.id[1:]) % 2}  # half of either domain, from another source
    lengths = lengths_of(rows, heavy)
    assert shares(lengths, config()) == {"a": 0.125, "a (weight 3)": 0.375, "b": 0.125, "b (weight 3)": 0.375}
    settings = config(domain_mix={"a": 4.0, "b": 1.0}, long_repeat=1)
    assert shares(lengths, settings) == pytest.approx({"a": 0.2, "a (weight 3)": 0.6, "b": 0.05, "b (weight 3)": 0.15})
    tokens: Counter[tuple[str, bool]] = Counter()
    for copy in named(rows, sample(lengths, settings)):
        tokens[copy.domain, copy.id in heavy] += copy.num_tokens
    assert tokens == {("a", False): 8_000, ("a", True): 24_000, ("b", False): 2_000, ("b", True): 6_000}


def test_equal_weights_are_no_weights() -> None:
    rows = corpus()
    doubled = lengths_of(rows, {row.id: 2.0 for row in rows})
    assert named(rows, sample(doubled, config())) == sampled(rows, config())


def test_named_documents_are_held_out_before_others() -> None:
    rows = corpus()
    names = [rows[7].id, rows[500].id]
    chosen = held(rows, config(holdout_ids=names, holdout_sequences=3))
    assert [row.id for row in chosen[:2]] == names
    assert len({row.id for row in chosen}) == 5
    assert held(rows, config(holdout_ids=names)) == chosen[:2]
    with pytest.raises(UserError, match="'absent': the corpus has no such document"):
        held(rows, config(holdout_ids=["absent"]))
