"""Where a run happens: its places, its locks and its processes."""
