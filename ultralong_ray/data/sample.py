"""Document lengths in, the list of document copies to pack out: per-domain length upsampling. Pure.

The rule follows Fu et al. (arXiv 2402.10171; their `slimpajama_packing.py` keeps 10 % of the documents below 4096
tokens and holds every source to its token budget) with the two thresholds of UltraLong (arXiv 2504.06214, section
3.1): short documents are thinned out, long ones repeated, and the token share of each domain held.

Every decision is a function of (seed, document id) through blake2b, never of input order or of the number of workers.
A document stands at a place in (0, 1) given by its hash, its copies evenly spaced around that circle, and a domain is
read in that order until its budget is met.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import PrepareConfig
from ultralong_ray.types import DocumentLength, SampledDocument, UserError


@dataclass(frozen=True, slots=True)
class DomainDraw:
    """The copies of one domain in the order in which they are taken."""

    copies: list[tuple[DocumentLength, int]]  # (document, copy number)
    ends: NDArray[np.int64]  # [copies], tokens up to and including each copy

    @property
    def available_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def count_for(self, tokens: int) -> int:
        """Copies that must be opened to take `tokens` tokens; all of them where that is not enough."""
        if tokens <= 0:
            return 0
        return min(int(np.searchsorted(self.ends, tokens, side="left")) + 1, len(self.copies))


@dataclass(frozen=True, slots=True)
class Draw:
    """All domains' copies and the share of packed tokens that each domain shall have."""

    shares: dict[str, float]
    domains: dict[str, DomainDraw]


def unit_hash(purpose: str, seed: int, document_id: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{document_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def target_shares(documents: Iterable[DocumentLength], config: PrepareConfig) -> dict[str, float]:
    """Share of packed tokens per domain: `domain_mix` normalised, or the corpus's own token shares.

    Raises UserError when `domain_mix` names a domain that the corpus does not have.
    """
    tokens: dict[str, int] = defaultdict(int)
    for document in documents:
        tokens[document.domain] += document.num_tokens
    weights: Mapping[str, float] = config.domain_mix if config.domain_mix is not None else tokens
    unknown = sorted(set(weights) - set(tokens))
    if unknown:
        raise UserError(
            f"prepare.domain_mix names {', '.join(map(repr, unknown))}, but the corpus has the domains "
            f"{', '.join(sorted(tokens))}"
        )
    total = sum(weights.values())
    if not total:
        raise UserError("corpus: no document has any token; give other sources")
    return {domain: weights[domain] / total for domain in sorted(weights)}


def choose_holdout(documents: Iterable[DocumentLength], config: PrepareConfig) -> list[DocumentLength]:
    """`holdout_sequences` documents of at least `sequence_length` tokens, by hash.

    The last such document of a domain is taken only when there is no other way. Raises UserError when too few
    documents are long enough.
    """
    wanted = config.holdout_sequences
    if not wanted:
        return []
    long = [d for d in documents if d.num_tokens >= config.sequence_length]
    if len(long) < wanted:
        raise UserError(
            f"prepare.holdout_sequences {wanted}: only {len(long)} documents have prepare.sequence_length "
            f"{config.sequence_length} tokens or more; lower holdout_sequences to {len(long)} or add long documents"
        )
    long.sort(key=lambda d: (unit_hash("holdout", config.seed, d.id), d.id))
    left: dict[str, int] = defaultdict(int)
    for document in long:
        left[document.domain] += 1
    chosen, last_of_domain = [], []
    for document in long:
        left[document.domain] -= 1
        (chosen if left[document.domain] else last_of_domain).append(document)
    return (chosen + last_of_domain)[:wanted]


def sample(
    documents: Sequence[DocumentLength],
    config: PrepareConfig,
    before_tokens: int = 0,
    after_tokens: int = 0,
    held_out: Collection[str] = (),
) -> list[SampledDocument]:
    """The copies that fill the budget, each with `before_tokens` and `after_tokens` of separator; in global order.

    The shares are of document tokens, separators not counted; the last copy of a domain is cut to meet its budget to
    the token. The sum with separators is the budget, or exceeds it by `after_tokens` at most (the last separator is
    cut by the end of the stream), or is short of it by `before_tokens` at most (room for no further document).
    Raises UserError with the tokens available per domain and length where they do not suffice.
    """
    total = config.num_sequences * config.sequence_length
    separator_tokens = before_tokens + after_tokens
    drawn = draw(documents, config, separator_tokens, held_out)
    budgets = _budgets(drawn, content_tokens(drawn, total, separator_tokens))
    lacking = [d for d, tokens in budgets.items() if tokens > drawn.domains[d].available_tokens]
    if lacking:
        raise UserError(_shortage(documents, config, held_out, drawn, budgets, lacking))
    _fill_gap(drawn, budgets, total, before_tokens, after_tokens)
    return in_global_order(drawn, budgets, cut=True)


def draw(
    documents: Sequence[DocumentLength], config: PrepareConfig, separator_tokens: int, held_out: Collection[str] = ()
) -> Draw:
    """Every domain's copies: `long_repeat` of each long document, more (up to `max_repeats`) where tokens lack.

    No document gets more copies than there are sequences, since two copies never share one.
    """
    total = config.num_sequences * config.sequence_length
    shares = target_shares(documents, config)
    kept: dict[str, list[DocumentLength]] = {domain: [] for domain in shares}
    for document in documents:
        if document.domain in kept and document.id not in held_out and _is_kept(document, config):
            kept[document.domain].append(document)
    most = min(config.max_repeats, config.num_sequences)
    repeats = dict.fromkeys(shares, min(config.long_repeat, most))
    domains = {d: _draw_domain(kept[d], config, repeats[d]) for d in shares}
    while True:
        drawn = Draw(shares, domains)
        budgets = _budgets(drawn, content_tokens(drawn, total, separator_tokens))
        lacking = [d for d in shares if budgets[d] > domains[d].available_tokens and repeats[d] < most]
        if not lacking:
            return drawn
        for domain in lacking:
            repeats[domain] += 1
            domains[domain] = _draw_domain(kept[domain], config, repeats[domain])


def _is_kept(document: DocumentLength, config: PrepareConfig) -> bool:
    if document.num_tokens >= config.short_below_tokens:
        return document.num_tokens > 0
    return document.num_tokens > 0 and unit_hash("keep", config.seed, document.id) < config.short_keep


def _draw_domain(documents: list[DocumentLength], config: PrepareConfig, repeats: int) -> DomainDraw:
    places: list[tuple[float, str, int, DocumentLength]] = []
    for document in documents:
        copies = repeats if document.num_tokens > config.long_above_tokens else 1
        place = unit_hash("order", config.seed, document.id)
        places += [((place + copy / copies) % 1.0, document.id, copy, document) for copy in range(copies)]
    places.sort(key=lambda p: p[:3])
    ends = np.cumsum([p[3].num_tokens for p in places], dtype=np.int64)
    return DomainDraw([(document, copy) for _, _, copy, document in places], ends)


def content_tokens(drawn: Draw, total: int, separator_tokens: int) -> int:
    """The most document tokens that, with a separator after every copy, stay within `total`."""
    low, high = 0, total
    while low < high:
        middle = (low + high + 1) // 2
        copies = sum(drawn.domains[d].count_for(tokens) for d, tokens in _budgets(drawn, middle).items())
        if middle + separator_tokens * copies <= total:
            low = middle
        else:
            high = middle - 1
    return low


def _budgets(drawn: Draw, content: int) -> dict[str, int]:
    """`content` tokens shared out: each domain within one token of its share, the sum exact."""
    ends = np.rint(np.cumsum(list(drawn.shares.values())) * content).astype(np.int64)
    ends[-1] = content
    return dict(zip(drawn.shares, np.diff(ends, prepend=0).tolist(), strict=True))


def _fill_gap(drawn: Draw, budgets: dict[str, int], total: int, before_tokens: int, after_tokens: int) -> None:
    """Give out the few tokens that are left because one more copy would have needed a whole separator."""
    separator_tokens = before_tokens + after_tokens
    copies = sum(drawn.domains[d].count_for(tokens) for d, tokens in budgets.items())
    gap = total - sum(budgets.values()) - separator_tokens * copies
    for domain, taken in drawn.domains.items():
        count = taken.count_for(budgets[domain])
        step = min(gap, int(taken.ends[count - 1]) - budgets[domain]) if count else 0
        budgets[domain] += step
        gap -= step
    for domain, taken in drawn.domains.items():
        while gap > before_tokens and budgets[domain] < taken.available_tokens:
            opened = taken.count_for(budgets[domain])
            step = min(gap - before_tokens, int(taken.ends[opened]) - budgets[domain])
            budgets[domain] += step
            gap -= step + separator_tokens


def in_global_order(drawn: Draw, budgets: Mapping[str, int], *, cut: bool) -> list[SampledDocument]:
    """The copies that meet the budgets, every domain spread evenly over the stream; the last of each cut if asked."""
    placed: list[tuple[float, SampledDocument]] = []
    for domain, tokens in budgets.items():
        taken = drawn.domains[domain]
        for i in range(taken.count_for(tokens)):
            document, copy = taken.copies[i]
            start = int(taken.ends[i]) - document.num_tokens
            used = min(document.num_tokens, tokens - start) if cut else document.num_tokens
            place = (start + used / 2) / tokens
            placed.append((place, SampledDocument(document.id, domain, copy, used)))
    placed.sort(key=lambda p: (p[0], p[1].domain, p[1].id, p[1].copy))
    return [copy for _, copy in placed]


def whole_copies(drawn: Draw, content: int) -> list[SampledDocument]:
    """About `content` tokens in whole documents: for packing that cuts none. Fewer where a domain has fewer."""
    return in_global_order(drawn, _budgets(drawn, content), cut=False)


def _shortage(
    documents: Sequence[DocumentLength],
    config: PrepareConfig,
    held_out: Collection[str],
    drawn: Draw,
    budgets: Mapping[str, int],
    lacking: Sequence[str],
) -> str:
    """The arithmetic of a corpus that is too small, and what would mend it."""
    lines = []
    for domain in lacking:
        short = middle = long = 0
        for document in documents:
            if document.domain != domain or document.id in held_out:
                continue
            if document.num_tokens < config.short_below_tokens:
                short += document.num_tokens
            elif document.num_tokens > config.long_above_tokens:
                long += document.num_tokens
            else:
                middle += document.num_tokens
        available = drawn.domains[domain].available_tokens
        lines.append(
            f"  {domain}: needs {budgets[domain]:,} tokens (share {drawn.shares[domain]:.4f}), has {available:,}: "
            f"{short:,} in documents below {config.short_below_tokens} (x short_keep {config.short_keep}), "
            f"{middle:,} between, {long:,} above {config.long_above_tokens} "
            f"(x up to {min(config.max_repeats, config.num_sequences)} copies)"
        )
    possible = min(drawn.domains[d].available_tokens / drawn.shares[d] for d in lacking)
    return (
        f"corpus: too small for prepare.token_budget {config.token_budget:,} "
        f"({config.num_sequences} sequences of {config.sequence_length})\n" + "\n".join(lines) + "\n"
        f"Lower prepare.token_budget to about {int(possible):,}, raise prepare.short_keep or prepare.max_repeats, or "
        f"ask for less of these domains in prepare.domain_mix"
    )
