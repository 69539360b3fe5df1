"""Prefect's hands: fetch inputs, call core, store outputs, record."""

from puzzle_core.credentials import redact_logs

redact_logs()
