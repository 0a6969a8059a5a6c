"""The built-in world of balls and rain; `python -m playground.world --help`."""
