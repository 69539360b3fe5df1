"""Models: opening a parent lazily, running blocks, assembling children."""
