"""The analysis workers: scores of channels, heads, layers and single weights. Runs without torch."""
