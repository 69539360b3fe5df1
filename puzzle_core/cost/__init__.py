"""Prefill and decode times of variants on a hardware target: measured in an engine, or computed from a data sheet."""
