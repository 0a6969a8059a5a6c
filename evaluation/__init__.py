"""What looks at a model or a run: validation losses, samples, gauges, comparisons."""
