"""Dial, listen, and bundle the connections of one link, whatever their kind."""
