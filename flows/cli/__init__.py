"""The `puzzle` command."""
