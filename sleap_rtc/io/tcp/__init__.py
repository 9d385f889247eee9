"""Links over TCP with TLS 1.3."""
