"""A child against its parent in one engine: rates, time to first token, memory."""
