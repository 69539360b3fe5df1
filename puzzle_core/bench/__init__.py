"""A bench of a child and its parent in one engine: rates, time to first token, memory."""
