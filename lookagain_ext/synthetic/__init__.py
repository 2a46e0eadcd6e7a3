"""Rendered scenes with known answers, and the tiny model that is trained on them."""
