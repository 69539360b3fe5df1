"""Formats that other projects read and write: `block_configs`, DeciLM's config, foreign JSON. No torch."""
