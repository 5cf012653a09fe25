"""Every sequence once per epoch, whatever the batch, and the cursor that says so."""

from __future__ import annotations

from ultralong_ray.train.order import Cursor, cursor_after, sequences_of_step


def test_steps_run_through_every_epoch_once() -> None:
    read = [s for step in range(1, 16) for s in sequences_of_step(step, 2, 10, seed=7)]
    epochs = [read[0:10], read[10:20], read[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_seed_and_epoch_only() -> None:
    assert sequences_of_step(6, 3, 10, seed=1) == sequences_of_step(6, 3, 10, seed=1)
    assert sequences_of_step(5, 3, 10, seed=1) != sequences_of_step(5, 3, 10, seed=2)
    assert sequences_of_step(1, 3, 10, seed=1) == sequences_of_step(1, 3, 10, seed=2)


def test_a_batch_may_span_two_epochs() -> None:
    batch = sequences_of_step(4, 3, 10, seed=1)
    assert batch[0] == 9 and len(batch) == 3
    assert batch[1:] == sequences_of_step(6, 2, 10, seed=1)


def test_cursor_counts_within_the_epoch() -> None:
    assert [cursor_after(step, 3, 6) for step in range(5)] == [
        Cursor(0, 0),
        Cursor(0, 3),
        Cursor(0, 6),
        Cursor(1, 3),
        Cursor(1, 6),
    ]
