"""Which chat samples are trained on: counts or shares per domain, drawn by hash. Pure.

Every decision is a function of (seed, sample id) and of the set of samples, never of their order.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ultralong_ray.config import SftConfig
from ultralong_ray.data.deduplicate import Duplicates, find_duplicates
from ultralong_ray.data.passes import source_number
from ultralong_ray.data.sample import unit_hash
from ultralong_ray.data.screening import PartAccount, read_accounts, read_prompts
from ultralong_ray.data.token_shards import StoredDocument
from ultralong_ray.storage import Location
from ultralong_ray.types import DocumentLength, SampledDocument, UserError


@dataclass(frozen=True, slots=True)
class Selection:
    """The samples to pack, and what became of all others."""

    chosen: list[SampledDocument]
    available: list[DocumentLength]  # those that could have been chosen
    accounts: list[PartAccount]
    sources: list[dict[str, Any]]  # one line per source, for report.json

    @property
    def too_long(self) -> int:
        return sum(account.too_long for account in self.accounts)


def select_samples(
    config: SftConfig, tokens: Location, names: Sequence[str], stored: Mapping[str, StoredDocument]
) -> Selection:
    """Take duplicates out of the stored samples and draw from the rest. `names` are those of all parts.

    Raises UserError as `samples_per_domain` does.
    """
    accounts = read_accounts(tokens, names)
    duplicates = Duplicates({}, {})
    if config.deduplicate is not None:
        duplicates = find_duplicates(read_prompts(tokens, names), config.deduplicate)
    repeated = duplicates.exact.keys() | duplicates.near.keys()
    available = [DocumentLength(d.id, d.domain, d.num_tokens) for d in stored.values() if d.id not in repeated]
    too_long, contaminated = (sum(getattr(a, key) for a in accounts) for key in ("too_long", "contaminated"))
    left_out = f"left out: {too_long} longer ones, {contaminated} contaminated, {len(repeated)} duplicates"
    chosen = choose_samples(available, config, left_out)
    return Selection(chosen, available, accounts, _source_report(config, accounts, stored, duplicates, chosen))


def choose_samples(available: Sequence[DocumentLength], config: SftConfig, left_out: str) -> list[SampledDocument]:
    """The samples to pack, in the order of their hash. `left_out` says in words what is no longer among them.

    Raises UserError with the samples per domain where they do not suffice, and for domains that there are not.
    """
    ordered = sorted(available, key=lambda d: (unit_hash("sft", config.seed, d.id), d.id))
    wanted = samples_per_domain(Counter(d.domain for d in available), config, left_out)
    taken: Counter[str] = Counter()
    chosen: list[SampledDocument] = []
    for sample in ordered:
        if wanted is None:
            fits = config.num_samples is None or len(chosen) < config.num_samples
        else:
            fits = taken[sample.domain] < wanted.get(sample.domain, 0)
        if fits:
            taken[sample.domain] += 1
            chosen.append(SampledDocument(sample.id, sample.domain, 0, sample.num_tokens))
    return chosen


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
    config: SftConfig,
    accounts: Sequence[PartAccount],
    stored: Mapping[str, StoredDocument],
    duplicates: Duplicates,
    chosen: Sequence[SampledDocument],
) -> list[dict[str, Any]]:
    """What became of the samples of each source."""
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for account in accounts:
        counts[source_number(account.name)].update(
            read=account.read, too_long=account.too_long, contaminated=account.contaminated
        )
    for key, ids in (
        ("exact_duplicates", duplicates.exact),
        ("near_duplicates", duplicates.near),
        ("drawn", [sample.id for sample in chosen]),
    ):
        for sample_id in ids:
            counts[source_number(stored[sample_id].shard)][key] += 1
    keys = ("read", "too_long", "contaminated", "exact_duplicates", "near_duplicates", "drawn")
    names = [source.uri or source.kind for source in config.sources]
    return [{"source": name, **{key: counts[s][key] for key in keys}} for s, name in enumerate(names)]
