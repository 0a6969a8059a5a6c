"""Weights in and out: released folders, names, headers, a model's own folder."""
