"""Corpus shards to packed sequences: read, tokenise, sample by length, pack, and say what was done."""
