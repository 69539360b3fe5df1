"""Search: one option per layer, least total score within every limit (METHOD section 6). It sees arrays only."""
