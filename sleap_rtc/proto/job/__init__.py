"""Machines of a job at its client and its worker, and the output of its commands."""
