"""The surroundings of a run: directories, locks, disk space, processes."""
