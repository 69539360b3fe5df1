"""The Puzzle method itself: torch and numerics only, no server, no bucket, no tracking."""
