"""One rank's part of the keys and values of a long prompt: some rows of the sequence, all key-value heads.

Flows in: the keys and values that this rank's rows had before the exchange around attention, so nothing is stored
twice, however many ranks share few key-value heads. Flows out: views that attention kernels read where they lie. All
ranks together hold  2 * layers * tokens * kv_heads * head_dim  numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Positions = NDArray[np.int64]
KeyValue = tuple[torch.Tensor, torch.Tensor]


class KVSlice:
    """Rows in ascending order of their positions; the same rows in every layer. Not thread-safe."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, 0, kv_heads, head_dim)
        self._layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.positions: Positions = np.empty(0, dtype=np.int64)  # [rows], of the rows held

    @property
    def num_bytes(self) -> int:
        """Of this rank's buffers, what is reserved and not filled included."""
        return sum(layer.nbytes for layer in self._layers)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all. Layers grow one by one, so only one is ever held twice."""
        for index, layer in enumerate(self._layers):
            if layer.shape[1] < rows:
                grown = layer.new_empty(2, rows, *layer.shape[2:])
                grown[:, : len(self.positions)] = layer[:, : len(self.positions)]
                self._layers[index] = grown

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put keys and values [new_rows, kv_heads, head_dim] behind the rows held. `commit` makes them held."""
        rows = slice(len(self.positions), len(self.positions) + len(key))
        self._layers[layer][0, rows] = key
        self._layers[layer][1, rows] = value

    def commit(self, positions: Positions) -> None:
        """What was written in every layer is held from now on. positions: [new_rows], after all those held."""
        self.positions = np.concatenate((self.positions, positions))

    def read(self, layer: int, written: int = 0) -> KeyValue:
        """Keys and values [1, rows, kv_heads, head_dim] of the rows held and of the `written` ones behind them."""
        rows = self._layers[layer][:, None, : len(self.positions) + written]
        return rows[0], rows[1]

    def crop(self, tokens: int) -> None:
        """Hold only positions below `tokens`; the memory stays."""
        self.positions = self.positions[: np.searchsorted(self.positions, tokens)]

    def release(self) -> None:
        """Hold nothing and give the memory back."""
        self.positions = self.positions[:0]
        self._layers = [layer.new_empty(2, 0, *layer.shape[2:]) for layer in self._layers]
