"""Training-free initial weights of subblock variants (METHOD section 2)."""
