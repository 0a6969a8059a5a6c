"""What looks at a model or a run: held-out losses, samples, gauges, comparisons."""
