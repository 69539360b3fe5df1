"""Where a run happens: its places, its locks, its disk space and its process."""
