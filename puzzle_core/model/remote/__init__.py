"""The code that travels with a child's checkpoint.

The two files beside this one are copied into every child directory, and transformers imports them from there
(`trust_remote_code=True`). This project runs the same files, so a block has one implementation. They may import torch,
transformers and each other only; what they need to know of a family stands in the child's config.
"""
