"""Prefect's hands: fetch inputs, call core, store outputs, record."""
