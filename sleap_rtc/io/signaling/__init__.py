"""WebSockets of the signaling role, and of the peers that use it."""
