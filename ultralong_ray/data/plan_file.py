"""The plan of a prepare stage as a file to read before a cluster is spent on it: plan.json and plan.txt. Pure.

plan.json holds what `summary.prepare_report` counts, per domain and per length bucket, before and after, with the
separator, the sequences and what was set aside; plan.txt the same as two tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plan_text(plan: dict[str, Any]) -> str:
    """plan.json's content as text for a terminal."""
    quarantine = plan["quarantine"]
    separator = plan["separator"]
    lines = [
        f"{plan['num_sequences']:,} sequences of {plan['sequence_length']:,} tokens = {plan['tokens']:,} tokens, "
        f"packing {plan['packing']}, separator {separator['mode']!r} = {separator['ids']}",
        f"{sum(d['documents_before'] for d in plan['domains'].values()):,} documents read, "
        f"{plan['holdout_documents']:,} held out; {quarantine['bad_rows']:,} bad rows set aside, "
        f"{len(quarantine['skipped_shards']):,} shards left out",
        "",
        *_table(_DOMAIN_HEAD, [_domain_row(name, d) for name, d in plan["domains"].items()]),
        "",
        *_table(_BUCKET_HEAD, [_bucket_row(b) for b in plan["buckets"]]),
    ]
    return "\n".join(lines) + "\n"


_DOMAIN_HEAD = ("domain", "documents", "tokens", "share", "", "copies", "tokens", "share", "asked", "long before/after")
_BUCKET_HEAD = ("domain", "length", "documents", "tokens", "", "documents", "x repeats", "tokens")


def _domain_row(name: str, d: dict[str, Any]) -> Sequence[str]:
    return (
        name,
        f"{d['documents_before']:,}",
        f"{d['tokens_before']:,}",
        f"{d['share_before']:.2%}",
        "->",
        f"{d['documents_after']:,}",
        f"{d['tokens_after']:,}",
        f"{d['share_after']:.2%}",
        f"{d['share_asked']:.2%}",
        f"{d['long_share_before']:.1%} / {d['long_share_after']:.1%}",
    )


def _bucket_row(b: dict[str, Any]) -> Sequence[str]:
    low, high = _short(b["from_tokens"]), b["below_tokens"]
    return (
        b["domain"],
        f"{low}+" if high is None else f"{low}-{_short(high)}",
        f"{b['documents_before']:,}",
        f"{b['tokens_before']:,}",
        "->",
        f"{b['documents_after']:,}",
        f"{b['repeats']:.2f}" if b["documents_after"] else "-",
        f"{b['tokens_after']:,}",
    )


def _short(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest entry: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
