"""Slow, obvious re-implementations to compare with: transformers' own models, whole, on loops that hide nothing."""
