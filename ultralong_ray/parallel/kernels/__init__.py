"""Attention kernels behind one signature. Each file touches one library; `choose` picks the best that can run."""
