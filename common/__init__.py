"""What every floor stands on: settings, strict dataclasses, files, git, durations, ranks.

Imports nothing of ours.
"""
