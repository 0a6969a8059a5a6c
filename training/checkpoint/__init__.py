"""Checkpoints that are whole or absent, and the run directory they lie in."""
