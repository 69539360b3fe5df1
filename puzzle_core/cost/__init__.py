"""Costs of variants on a hardware target: exact bytes, measured times, and the table that the search reads."""
