"""Prefect tasks: they fetch inputs, call puzzle_core, store outputs, and log lineage."""

from puzzle_core.credentials import redact_logs

redact_logs()
