"""The code that travels with a child's checkpoint.

The two files beside this one are copied into every child directory and imported from there by transformers
(`trust_remote_code=True`). They are also what this project itself runs, so there is one implementation of a block.
They may import torch and transformers only.
"""
