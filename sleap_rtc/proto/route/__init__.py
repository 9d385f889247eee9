"""Where a job's bytes travel, and how a lost link comes back."""
