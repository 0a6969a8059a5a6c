"""What every floor stands on: settings, ranks, strict dataclasses. Imports nothing of ours."""
