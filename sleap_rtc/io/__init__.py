"""Trio drivers: they move bytes and time between the world and `proto`."""
