"""Clips to encoded shards, shards to batches."""
