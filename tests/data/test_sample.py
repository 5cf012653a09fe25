"""Length upsampling: budgets to the token, the mix, the keep and repeat rules, refusals; all from hashes alone."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import pytest

from ultralong_ray.config import PrepareConfig
from ultralong_ray.data.pack import Separators, plan_concatenated
from ultralong_ray.data.sample import choose_holdout, draw, sample, target_shares, unit_hash
from ultralong_ray.types import DocumentLength, SampledDocument, UserError


def config(**fields: Any) -> PrepareConfig:
    defaults = {"sequence_length": 1000, "token_budget": 40_000, "short_below_tokens": 100, "long_above_tokens": 400}
    return PrepareConfig(**{**defaults, **fields})


def corpus(seed: int = 0, documents: int = 900) -> list[DocumentLength]:
    rng = random.Random(seed)
    domains = rng.choices(["code", "books", "web"], [5, 2, 3], k=documents)
    return [DocumentLength(f"{d}-{i}", d, int(rng.lognormvariate(5, 1.2)) + 1) for i, d in enumerate(domains)]


def tokens_of(copies: list[SampledDocument]) -> Counter[str]:
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
        copies = sample(documents, settings, before, after)
        tokens = tokens_of(copies)
        excess = tokens.total() + len(copies) * (before + after) - 40_000
        assert -before <= excess <= after
        for domain, share in target_shares(documents, settings).items():
            assert tokens[domain] / tokens.total() == pytest.approx(share, abs=0.001)


def test_exact_fit_of_a_whole_corpus() -> None:
    documents = [DocumentLength(f"d{i}", "a", 98) for i in range(10)]
    settings = config(sequence_length=1000, token_budget=1000, short_below_tokens=0)
    assert sum(c.num_tokens for c in sample(documents, settings, 0, 2)) == 980
    with pytest.raises(UserError, match="too small"):
        sample(documents[:-1], settings, 0, 2)


def test_room_for_no_more_than_the_start_of_a_separator_stays_free() -> None:
    documents = [DocumentLength(f"d{i}", "a", 97) for i in range(11)]
    settings = config(sequence_length=1002, token_budget=1002, short_below_tokens=0)
    copies = sample(documents, settings, before_tokens=3)
    assert [c.num_tokens for c in copies] == [97] * 10  # 10 x (97 + 3) leaves 2
    plan = plan_concatenated(copies, Separators(before=(1, 2, 3)), 1002, 1)
    assert (plan.separators[-1].start, plan.separators[-1].end) == (1000, 1002)


@pytest.mark.parametrize("separators", [Separators(), Separators((1,), (2,)), Separators((1, 2, 3), (4, 5, 6, 7))])
def test_packing_places_every_copy_to_the_token(separators: Separators) -> None:
    for seed in range(5):
        settings = config(seed=seed, short_keep=0.5, max_repeats=8)
        copies = sample(corpus(seed), settings, len(separators.before), len(separators.after))
        placed: Counter[tuple[str, int]] = Counter()
        for p in plan_concatenated(copies, separators, 1000, 40).placements:
            placed[p.id, p.copy] += p.end - p.start
        assert placed == {(c.id, c.copy): c.num_tokens for c in copies}


def test_short_kept_by_hash_middle_once_long_repeated() -> None:
    documents = corpus(3)
    settings = config(token_budget=10**6, short_keep=0.3, long_repeat=2, max_repeats=2)
    drawn = draw(documents, settings, 0)
    copies = Counter(d.id for domain in drawn.domains.values() for d, _ in domain.copies)
    short = [d for d in documents if d.num_tokens < 100]
    kept = [d for d in short if copies[d.id]]
    assert kept == [d for d in short if unit_hash("keep", 42, d.id) < 0.3]
    assert 0.2 < len(kept) / len(short) < 0.4
    assert {copies[d.id] for d in kept} == {1}
    assert {copies[d.id] for d in documents if 100 <= d.num_tokens <= 400} == {1}
    assert {copies[d.id] for d in documents if d.num_tokens > 400} == {2}


def test_repeats_rise_only_where_a_domain_lacks_tokens() -> None:
    documents = [DocumentLength(f"rich{i}", "rich", 500) for i in range(100)]
    documents += [DocumentLength(f"poor{i}", "poor", 500) for i in range(15)]
    settings = config(domain_mix={"rich": 1.0, "poor": 1.0}, max_repeats=4)
    copies: dict[str, set[int]] = defaultdict(set)
    for copy in sample(documents, settings):
        copies[copy.domain].add(copy.copy)
    assert copies["poor"] == {0, 1, 2}  # 20,000 tokens of 7,500: three copies are needed, a fourth is not
    assert copies["rich"] <= {0, 1}
    with pytest.raises(UserError, match="too small"):
        sample(documents, config(domain_mix={"rich": 1.0, "poor": 1.0}, max_repeats=2))


def test_too_small_a_corpus_gives_the_arithmetic() -> None:
    with pytest.raises(UserError) as error:
        sample(corpus(), config(token_budget=10**9))
    message = str(error.value)
    for part in ("code: needs", "books: needs", "below 100", "above 400", "token_budget", "short_keep", "max_repeats"):
        assert part in message


def test_the_budget_proposed_by_the_refusal_is_met() -> None:
    with pytest.raises(UserError) as error:
        sample(corpus(), config(token_budget=10**7))
    proposed = int(str(error.value).split("token_budget to about ")[1].split(" ")[0].strip(",").replace(",", ""))
    assert sample(corpus(), config(token_budget=proposed))


def test_unknown_domain_is_named() -> None:
    with pytest.raises(UserError, match=r"'novels'.*books, code, web"):
        sample(corpus(), config(domain_mix={"novels": 1.0}))


def test_depends_on_seed_and_id_alone() -> None:
    documents = corpus()
    shuffled = random.Random(1).sample(documents, len(documents))
    assert sample(documents, config()) == sample(shuffled, config())
    assert sample(documents, config()) != sample(documents, config(seed=43))


def test_domains_are_spread_over_the_stream() -> None:
    copies = sample(corpus(documents=4000), config(token_budget=200_000))
    half = len(copies) // 2
    first, whole = tokens_of(copies[:half]), tokens_of(copies)
    for domain in whole:
        assert first[domain] / first.total() == pytest.approx(whole[domain] / whole.total(), abs=0.03)


def test_holdout_is_long_and_not_sampled() -> None:
    documents = corpus(documents=3000)
    settings = config(holdout_sequences=5)
    chosen = choose_holdout(documents, settings)
    assert len(chosen) == 5 and all(d.num_tokens >= 1000 for d in chosen)
    held = {d.id for d in chosen}
    # asked for nearly all there is, every other long document must be drawn
    assert held.isdisjoint(c.id for c in sample(documents, config(token_budget=300_000), held_out=held))
    assert not held.isdisjoint(c.id for c in sample(documents, config(token_budget=300_000)))


def test_holdout_leaves_a_long_document_in_each_domain_where_it_can() -> None:
    documents = [DocumentLength(f"{d}{i}", d, 1000) for d, n in (("a", 4), ("b", 1), ("c", 2)) for i in range(n)]
    for seed in range(10):
        chosen = choose_holdout(documents, config(holdout_sequences=4, seed=seed))
        assert Counter(d.domain for d in chosen) == {"a": 3, "c": 1}
    assert len(choose_holdout(documents, config(holdout_sequences=7))) == 7
    with pytest.raises(UserError, match="only 7 documents"):
        choose_holdout(documents, config(holdout_sequences=8))
