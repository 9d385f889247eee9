"""Congestion control and path MTU of QUIC, as pure machines."""
