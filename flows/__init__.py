"""The method as Prefect flows: a library per parent, a search per target and scenario, a child per architecture."""

from puzzle_core.credentials import redact_logs

redact_logs()
