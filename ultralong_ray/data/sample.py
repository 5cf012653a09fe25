"""Document lengths in, the list of document copies to pack out: per-domain length upsampling. Pure, on columns.

The rule follows Fu et al. (arXiv 2402.10171; their `slimpajama_packing.py` keeps 10 % of the documents below 4096
tokens and holds every source to its token budget) with the two thresholds of UltraLong (arXiv 2504.06214, section
3.1): short documents are thinned out, long ones repeated, and the token share of each domain held.

Every decision is a function of (seed, document id): a 64-bit hash of the id, mixed with a hash of the seed, never the
order of the input or the number of workers. A document stands at a place in [0, 1) given by its hash, its copies evenly
spaced around that circle, and a domain is read in that order until its budget is met. Where sources have weights, a
group is the documents of one domain from sources of one weight; else a group is a domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import PrepareConfig
from ultralong_ray.data.token_shards import DocumentTable, id_hash
from ultralong_ray.types import UserError

IntColumn = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Documents whose share of tokens is held together."""

    domain: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.domain if self.weight == 1.0 else f"{self.domain} (weight {self.weight:g})"


@dataclass(frozen=True, slots=True)
class Lengths:
    """What sampling sees of a corpus. Row i of every column is document i."""

    groups: tuple[Group, ...]
    id_hash: NDArray[np.uint64]  # [documents]
    num_tokens: IntColumn  # [documents]
    group: NDArray[np.int32]  # [documents], index into `groups`

    @staticmethod
    def of(table: DocumentTable, source_weights: Sequence[float]) -> Lengths:
        """Documents grouped by domain and the weight of their source; groups in the order of their names."""
        weights = sorted(set(source_weights))
        by_shard = np.array([weights.index(source_weights[s]) for s in table.sources], np.int64)
        code = np.repeat(by_shard, np.diff(table.first_row))
        code += table.domain * np.int64(len(weights))
        used, group = np.unique(code, return_inverse=True)
        groups = tuple(Group(table.domains[c // len(weights)], weights[c % len(weights)]) for c in used.tolist())
        return Lengths(groups, table.id_hash, table.num_tokens, group.astype(np.int32))

    @property
    def group_tokens(self) -> IntColumn:
        """Tokens of each group: int64 [groups]."""
        # float64 is exact up to 2^53 tokens
        return np.bincount(self.group, self.num_tokens, len(self.groups)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Copies:
    """Document copies as columns; only the first `num_tokens` tokens of a copy are used."""

    row: IntColumn  # [copies], which document
    copy: NDArray[np.int32]  # [copies], 0, 1, ... of the same document
    num_tokens: IntColumn  # [copies]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, order: IntColumn | slice) -> Copies:
        return Copies(self.row[order], self.copy[order], self.num_tokens[order])


@dataclass(frozen=True, slots=True)
class GroupDraw:
    """The copies of one group in the order in which they are taken."""

    copies: Copies
    ends: IntColumn  # [copies], tokens up to and including each copy

    @property
    def available_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def count_for(self, tokens: int) -> int:
        """Copies that must be opened to take `tokens` tokens; all of them where that is not enough."""
        if tokens <= 0:
            return 0
        return min(int(np.searchsorted(self.ends, tokens, side="left")) + 1, len(self.ends))


@dataclass(frozen=True, slots=True)
class Draw:
    """Every group's copies and the share of packed tokens that it shall have, in the order of `Lengths.groups`."""

    shares: NDArray[np.float64]  # [groups]
    groups: list[GroupDraw]


def unit_hash(purpose: str, seed: int, hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on nothing but the arguments: [n].

    The mixing is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    mixed = hashes ^ np.uint64(id_hash(f"{purpose}\0{seed}"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


def target_shares(lengths: Lengths, config: PrepareConfig) -> NDArray[np.float64]:
    """Share of packed tokens per group: `domain_mix` normalised, or the corpus's own weighted token shares.

    Within a domain the groups share as their weighted tokens do. Raises UserError when `domain_mix` names a domain that
    the corpus does not have.
    """
    weighted = lengths.group_tokens * np.array([g.weight for g in lengths.groups])
    domains = [g.domain for g in lengths.groups]
    if config.domain_mix is not None:
        of_domain = {d: sum(w for w, e in zip(weighted, domains, strict=True) if e == d) for d in domains}
        unknown = sorted(set(config.domain_mix) - set(domains))
        if unknown:
            raise UserError(
                f"prepare.domain_mix names {', '.join(map(repr, unknown))}, but the corpus has the domains "
                f"{', '.join(sorted(set(domains)))}"
            )
        mix = config.domain_mix
        parts = [mix.get(d, 0.0) * w / of_domain[d] if w else 0.0 for w, d in zip(weighted, domains, strict=True)]
        weighted = np.array(parts)
    if not weighted.sum():
        raise UserError("corpus: no document has any token; give other sources")
    return weighted / weighted.sum()


def choose_holdout(lengths: Lengths, config: PrepareConfig) -> IntColumn:
    """Rows of the documents of `holdout_ids`, then of `holdout_sequences` ones of at least `sequence_length` tokens.

    The latter go by hash; the last such document of a group is taken only when there is no other way. Raises UserError
    when too few documents are long enough, or an id is not in the corpus.
    """
    named = _rows_of_ids(lengths, config)
    wanted = config.holdout_sequences
    if not wanted:
        return named
    long = np.setdiff1d(np.flatnonzero(lengths.num_tokens >= config.sequence_length), named)
    if len(long) < wanted:
        raise UserError(
            f"prepare.holdout_sequences {wanted}: only {len(long)} documents have prepare.sequence_length "
            f"{config.sequence_length} tokens or more; lower holdout_sequences to {len(long)} or add long documents"
        )
    hashes = lengths.id_hash[long]
    long = long[np.lexsort((hashes, unit_hash("holdout", config.seed, hashes)))]
    _, last = np.unique(lengths.group[long][::-1], return_index=True)
    is_last = np.zeros(len(long), bool)
    is_last[len(long) - 1 - last] = True
    return np.concatenate([named, np.concatenate([long[~is_last], long[is_last]])[:wanted]])


def _rows_of_ids(lengths: Lengths, config: PrepareConfig) -> IntColumn:
    """Rows of `prepare.holdout_ids`, in the order of the corpus."""
    hashes = {id_hash(name): name for name in config.holdout_ids}
    rows = np.flatnonzero(np.isin(lengths.id_hash, np.array(list(hashes), np.uint64)))
    absent = sorted(hashes[value] for value in hashes.keys() - set(lengths.id_hash[rows].tolist()))
    if absent:
        raise UserError(f"prepare.holdout_ids names {', '.join(map(repr, absent))}: the corpus has no such document")
    return rows


def sample(
    lengths: Lengths,
    config: PrepareConfig,
    before_tokens: int = 0,
    after_tokens: int = 0,
    held_out: IntColumn | None = None,
) -> Copies:
    """The copies that fill the budget, each with `before_tokens` and `after_tokens` of separator; in global order.

    The shares are of document tokens, separators not counted; the last copy of a group is cut to meet its budget to
    the token. The sum with separators is the budget, or exceeds it by `after_tokens` at most (the last separator is
    cut by the end of the stream), or is short of it by `before_tokens` at most (room for no further document).
    Raises UserError with the tokens available per group and length where they do not suffice.
    """
    total = config.num_sequences * config.sequence_length
    separator_tokens = before_tokens + after_tokens
    drawn = draw(lengths, config, separator_tokens, held_out)
    budgets = _budgets(drawn, content_tokens(drawn, total, separator_tokens))
    lacking = [g for g, tokens in enumerate(budgets) if tokens > drawn.groups[g].available_tokens]
    if lacking:
        raise UserError(_shortage(lengths, config, held_out, drawn, budgets, lacking))
    _fill_gap(drawn, budgets, total, before_tokens, after_tokens)
    return in_global_order(lengths, drawn, budgets, cut=True)


def draw(lengths: Lengths, config: PrepareConfig, separator_tokens: int, held_out: IntColumn | None = None) -> Draw:
    """Every group's copies: `long_repeat` of each long document, more (up to `max_repeats`) where tokens lack.

    No document gets more copies than there are sequences, since two copies never share one.
    """
    total = config.num_sequences * config.sequence_length
    shares = target_shares(lengths, config)
    kept = _kept(lengths, config, held_out)
    kept = kept[np.argsort(lengths.group[kept], kind="stable")]
    edges = np.searchsorted(lengths.group[kept], np.arange(1, len(lengths.groups)))
    rows = np.split(kept, edges)
    most = min(config.max_repeats, config.num_sequences)
    repeats = [min(config.long_repeat, most)] * len(rows)
    groups = [_draw_group(lengths, rows[g], config, repeats[g]) for g in range(len(rows))]
    while True:
        drawn = Draw(shares, groups)
        budgets = _budgets(drawn, content_tokens(drawn, total, separator_tokens))
        lacking = [g for g, tokens in enumerate(budgets) if tokens > groups[g].available_tokens and repeats[g] < most]
        if not lacking:
            return drawn
        for g in lacking:
            repeats[g] += 1
            groups[g] = _draw_group(lengths, rows[g], config, repeats[g])


def _kept(lengths: Lengths, config: PrepareConfig, held_out: IntColumn | None) -> IntColumn:
    """Rows that enter the draw: not held out, not empty, and of the short ones those that their hash keeps."""
    keep = lengths.num_tokens > 0
    short = np.flatnonzero(lengths.num_tokens < config.short_below_tokens)
    keep[short] &= unit_hash("keep", config.seed, lengths.id_hash[short]) < config.short_keep
    if held_out is not None:
        keep[held_out] = False
    return np.flatnonzero(keep)


def _draw_group(lengths: Lengths, rows: IntColumn, config: PrepareConfig, repeats: int) -> GroupDraw:
    copies = np.where(lengths.num_tokens[rows] > config.long_above_tokens, repeats, 1)
    each = np.repeat(np.arange(len(rows)), copies)  # [copies]
    copy = np.arange(len(each)) - np.repeat(np.cumsum(copies) - copies, copies)
    place = unit_hash("order", config.seed, lengths.id_hash[rows])[each]
    place = (place + copy / copies[each]) % 1.0
    row = rows[each]
    order = np.lexsort((copy, lengths.id_hash[row], place))
    chosen = Copies(row[order], copy[order].astype(np.int32), lengths.num_tokens[row[order]])
    return GroupDraw(chosen, np.cumsum(chosen.num_tokens))


def content_tokens(drawn: Draw, total: int, separator_tokens: int) -> int:
    """The most document tokens that, with a separator after every copy, stay within `total`."""
    low, high = 0, total
    while low < high:
        middle = (low + high + 1) // 2
        copies = sum(drawn.groups[g].count_for(tokens) for g, tokens in enumerate(_budgets(drawn, middle)))
        if middle + separator_tokens * copies <= total:
            low = middle
        else:
            high = middle - 1
    return low


def _budgets(drawn: Draw, content: int) -> list[int]:
    """`content` tokens shared out: each group within one token of its share, the sum exact."""
    ends = np.rint(np.cumsum(drawn.shares) * content).astype(np.int64)
    ends[np.flatnonzero(drawn.shares)[-1] :] = content
    return np.diff(ends, prepend=0).tolist()


def _fill_gap(drawn: Draw, budgets: list[int], total: int, before_tokens: int, after_tokens: int) -> None:
    """Give out the few tokens that are left because one more copy would have needed a whole separator."""
    separator_tokens = before_tokens + after_tokens
    shared = [g for g, share in enumerate(drawn.shares) if share]
    copies = sum(drawn.groups[g].count_for(budgets[g]) for g in shared)
    gap = total - sum(budgets) - separator_tokens * copies
    for g in shared:
        taken = drawn.groups[g]
        count = taken.count_for(budgets[g])
        step = min(gap, int(taken.ends[count - 1]) - budgets[g]) if count else 0
        budgets[g] += step
        gap -= step
    for g in shared:
        taken = drawn.groups[g]
        while gap > before_tokens and budgets[g] < taken.available_tokens:
            opened = taken.count_for(budgets[g])
            step = min(gap - before_tokens, int(taken.ends[opened]) - budgets[g])
            budgets[g] += step
            gap -= step + separator_tokens


def in_global_order(lengths: Lengths, drawn: Draw, budgets: Sequence[int], *, cut: bool) -> Copies:
    """The copies that meet the budgets, every group spread evenly over the stream; the last of each cut if asked."""
    chosen, places = [], []
    for taken, tokens in zip(drawn.groups, budgets, strict=True):
        copies = taken.copies.take(slice(taken.count_for(tokens)))
        start = taken.ends[: len(copies)] - copies.num_tokens
        used = np.minimum(copies.num_tokens, tokens - start) if cut else copies.num_tokens
        places.append((start + used / 2) / max(tokens, 1))
        chosen.append(Copies(copies.row, copies.copy, used))
    whole = Copies(*(np.concatenate([getattr(c, name) for c in chosen]) for name in ("row", "copy", "num_tokens")))
    keys = (whole.copy, lengths.id_hash[whole.row], lengths.group[whole.row], np.concatenate(places))
    return whole.take(np.lexsort(keys))


def whole_copies(lengths: Lengths, drawn: Draw, content: int) -> Copies:
    """About `content` tokens in whole documents: for packing that cuts none. Fewer where a group has fewer."""
    return in_global_order(lengths, drawn, _budgets(drawn, content), cut=False)


def _shortage(
    lengths: Lengths,
    config: PrepareConfig,
    held_out: IntColumn | None,
    drawn: Draw,
    budgets: Sequence[int],
    lacking: Sequence[int],
) -> str:
    """The arithmetic of a corpus that is too small, and what would mend it."""
    free = np.ones(len(lengths.num_tokens), bool)
    if held_out is not None:
        free[held_out] = False
    lines = []
    for g in lacking:
        tokens = lengths.num_tokens[free & (lengths.group == g)]
        short = int(tokens[tokens < config.short_below_tokens].sum())
        long = int(tokens[tokens > config.long_above_tokens].sum())
        lines.append(
            f"  {lengths.groups[g]}: needs {budgets[g]:,} tokens (share {drawn.shares[g]:.4f}), has "
            f"{drawn.groups[g].available_tokens:,}: {short:,} in documents below {config.short_below_tokens} "
            f"(x short_keep {config.short_keep}), {int(tokens.sum()) - short - long:,} between, {long:,} above "
            f"{config.long_above_tokens} (x up to {min(config.max_repeats, config.num_sequences)} copies)"
        )
    possible = int(min(drawn.groups[g].available_tokens / drawn.shares[g] for g in lacking))
    sequences = possible // config.sequence_length
    smaller = f"prepare.token_budget to {sequences * config.sequence_length:,} or less"
    if not sequences:
        smaller = f"prepare.sequence_length and prepare.token_budget to less than {possible:,}"
    return (
        f"corpus: too small for prepare.token_budget {config.token_budget:,} "
        f"({config.num_sequences} sequences of {config.sequence_length})\n" + "\n".join(lines) + "\n"
        f"Lower {smaller}, raise prepare.short_keep or prepare.max_repeats, or ask for less of these domains in "
        f"prepare.domain_mix"
    )
