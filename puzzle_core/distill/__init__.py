"""Distillation: blockwise and local (BLD), then global (GKD)."""
