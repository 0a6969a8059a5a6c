"""Shards to batches: the same order on any number of ranks, faults never hidden."""
