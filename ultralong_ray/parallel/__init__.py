"""One sequence over many ranks: who holds what, the exchange around attention, and a loss without whole logits."""
