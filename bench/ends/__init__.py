"""Programs that contestants run: the two ends of a transfer."""
