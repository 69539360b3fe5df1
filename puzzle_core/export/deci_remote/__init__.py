"""The code that travels with an exported child; it may import torch and transformers only.

Engines read the configuration (`block_configs` by attribute); transformers runs the model.
"""
