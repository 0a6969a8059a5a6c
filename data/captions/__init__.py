"""Captions for the clips of a manifest; `python -m data.captions --help`."""
