"""How good the tiny backbones and what is sampled with them are."""
