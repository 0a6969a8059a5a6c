"""The built-in world, the tiny backbones trained on it, and how good they are."""
