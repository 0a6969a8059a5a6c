"""What keeps a run from harm: bad numbers, hangs, signals, failures, slow ranks."""
