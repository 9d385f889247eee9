"""One job as its client and its worker see it, and what it prints."""
