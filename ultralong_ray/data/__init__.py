"""Corpus shards and chat samples in, packed sequences out. Everything but `pipeline` is free of Ray."""
