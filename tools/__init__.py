"""Verbs that are not training: sample, and the tiny backbones of the built-in world."""
