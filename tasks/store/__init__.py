"""The artifact store: a directory or a bucket, whole artifacts only."""
