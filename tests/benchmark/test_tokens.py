"""Synthetic tokens: every rank's part together is the sequence, with targets where they are wanted."""

from __future__ import annotations

import numpy as np

from ultralong_ray.benchmark.long_check import target_rows
from ultralong_ray.benchmark.tokens import IGNORED_LABEL, sequence, slice_of


def test_parts_make_the_whole() -> None:
    ids = sequence(24, 50, seed=1, step=2)
    whole = slice_of(ids, ((0, 24),))
    assert whole.labels[0, :-1].tolist() == ids[1:].tolist() and whole.labels[0, -1] == IGNORED_LABEL
    assert whole.loss_weight.sum() == 23 and whole.document_ids is None
    parts = [slice_of(ids, ((0, 6), (18, 24))), slice_of(ids, ((6, 18),))]
    positions = np.concatenate([part.position_ids[0] for part in parts])
    assert sorted(positions.tolist()) == list(range(24))
    for name in ("input_ids", "labels", "loss_weight"):
        joined = np.concatenate([getattr(part, name)[0] for part in parts])
        assert joined[np.argsort(positions)].tolist() == getattr(whole, name)[0].tolist()


def test_sequences_differ_by_step_and_group_only() -> None:
    first = sequence(64, 50, 1, 0).tolist()
    assert sequence(64, 50, 1, 0).tolist() == first
    assert sequence(64, 50, 1, 1).tolist() != first != sequence(64, 50, 1, 0, group=1).tolist()


def test_targets_at_chosen_rows() -> None:
    ids = sequence(24, 50, 1, 0)
    part = slice_of(ids, ((0, 4), (20, 24)), np.array([3, 10, 22]))
    assert part.position_ids[0, part.loss_weight[0] > 0].tolist() == [3, 22]
    assert part.labels[0, 3] == ids[4] and (part.labels[0] == IGNORED_LABEL).sum() == 6


def test_target_rows_hold_the_edges_and_never_the_last_token() -> None:
    rows = target_rows(2**22, 256, seed=3)
    assert len(set(rows.tolist())) == 256 and (np.diff(rows) > 0).all()
    assert {0, 65_535, 65_536, 2**20, 2**21, 2**22 - 2} <= set(rows.tolist())
    assert target_rows(8, 256, seed=3).tolist() == list(range(7))
