"""The route of a job's bytes, and the recovery of a lost link."""
