"""Rooms that this machine is in, and the introductions made there."""
