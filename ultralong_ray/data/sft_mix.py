"""Which chat samples are trained on: counts or shares per domain, drawn by hash. Pure.

Every decision is a function of (seed, sample id) and of the set of samples, never of their order.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import SftConfig
from ultralong_ray.data.deduplicate import Duplicates, find_duplicates
from ultralong_ray.data.sample import Copies, unit_hash
from ultralong_ray.data.screening import PartAccount, read_accounts, read_prompts
from ultralong_ray.data.token_shards import DocumentTable
from ultralong_ray.types import UserError

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """The samples to pack, and what became of all others."""

    copies: Copies
    accounts: list[PartAccount]
    sources: list[dict[str, Any]]  # one line per source, for report.json

    @property
    def too_long(self) -> int:
        return sum(account.too_long for account in self.accounts)


def select_samples(config: SftConfig, table: DocumentTable) -> Selection:
    """Take duplicates out of the samples and draw from the rest. Raises UserError as `samples_per_domain` does."""
    accounts = read_accounts(table)
    duplicates = Duplicates({}, {})
    rows = np.arange(len(table))
    row_of: dict[str, int] = {}
    if config.deduplicate is not None:
        duplicates = find_duplicates(read_prompts(table), config.deduplicate)
        row_of = {name: row for row, name in enumerate(table.ids(rows))}
    repeated = [row_of[name] for name in (*duplicates.exact, *duplicates.near)]
    too_long, contaminated = (sum(getattr(a, key) for a in accounts) for key in ("too_long", "contaminated"))
    left_out = f"left out: {too_long} longer ones, {contaminated} contaminated, {len(repeated)} duplicates"
    chosen = choose_samples(np.setdiff1d(rows, repeated), table, config, left_out)
    copies = Copies(chosen, np.zeros(len(chosen), np.int32), table.num_tokens[chosen])
    dropped = {
        "exact_duplicates": np.array([row_of[name] for name in duplicates.exact], np.int64),
        "near_duplicates": np.array([row_of[name] for name in duplicates.near], np.int64),
        "drawn": chosen,
    }
    return Selection(copies, accounts, _source_report(config, accounts, table, dropped))


def choose_samples(available: Rows, table: DocumentTable, config: SftConfig, left_out: str) -> Rows:
    """The rows of the samples to pack, in the order of their hash. `left_out` says what is no longer among them.

    Raises UserError with the samples per domain where they do not suffice, and for domains that there are not.
    """
    hashes = table.id_hash[available]
    ordered = available[np.lexsort((hashes, unit_hash("sft", config.seed, hashes)))]
    domains = table.domain[ordered]
    counts = np.bincount(domains, minlength=len(table.domains)).tolist()
    held = {name: count for name, count in zip(table.domains, counts, strict=True) if count}
    wanted = samples_per_domain(held, config, left_out)
    if wanted is None:
        return ordered[: config.num_samples]
    first = [np.flatnonzero(domains == table.domains.index(name))[:count] for name, count in wanted.items()]
    return ordered[np.sort(np.concatenate(first))]


def samples_per_domain(available: Mapping[str, int], config: SftConfig, left_out: str) -> dict[str, int] | None:
    """How many samples each domain gives; None: domains are not asked about. Raises UserError where they lack."""
    total = sum(available.values())
    held = f"the sources hold {total} samples of at most sft.max_sample_tokens {config.max_sample_tokens} tokens"
    remedy = "lower num_samples or raise max_sample_tokens"
    if not total or (config.num_samples or 0) > total:
        raise UserError(f"sft.num_samples {config.num_samples or 'all'}: {held} ({left_out}); {remedy}")
    field = "domain_samples" if config.domain_samples is not None else "domain_mix"
    asked = config.domain_samples or config.domain_mix
    if asked is None:
        return None
    unknown = sorted(set(asked) - set(available))
    if unknown:
        raise UserError(
            f"sft.{field} names {', '.join(map(repr, unknown))}, but the samples have the domains "
            f"{', '.join(sorted(available))}"
        )
    wanted = dict(config.domain_samples) if config.domain_samples is not None else _share_out(asked, available, config)
    lacking = [d for d in sorted(wanted) if wanted[d] > available[d]]
    if lacking:
        lines = [f"  {d}: needs {wanted[d]}, has {available[d]}" for d in lacking]
        raise UserError(
            f"sft.{field}: too few samples ({left_out})\n" + "\n".join(lines) + f"\nAsk for less of these, {remedy}"
        )
    return wanted


def _share_out(mix: Mapping[str, float], available: Mapping[str, int], config: SftConfig) -> dict[str, int]:
    """`num_samples`, or as many as the scarcest domain allows, shared out: the sum exact, each within one."""
    names = sorted(mix)
    shares = np.array([mix[name] for name in names], np.float64)
    shares /= shares.sum()
    total = config.num_samples or int(min(available[n] / s for n, s in zip(names, shares, strict=True)))
    ends = np.rint(np.cumsum(shares) * total).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    if config.num_samples is None:
        counts = np.minimum(counts, [available[n] for n in names])
    return dict(zip(names, counts.tolist(), strict=True))


def _source_report(
    config: SftConfig, accounts: list[PartAccount], table: DocumentTable, rows: Mapping[str, Rows]
) -> list[dict[str, Any]]:
    """What became of the samples of each source."""
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for account in accounts:
        counts[account.source].update(read=account.read, too_long=account.too_long, contaminated=account.contaminated)
    for key, which in rows.items():
        for shard in table.shard_of(which).tolist():
            counts[table.sources[shard]][key] += 1
    keys = ("read", "too_long", "contaminated", "exact_duplicates", "near_duplicates", "drawn")
    names = [source.uri or source.kind for source in config.sources]
    return [{"source": name, **{key: counts[s][key] for key in keys}} for s, name in enumerate(names)]
