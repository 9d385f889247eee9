"""Links over QUIC, with aioquic beneath.

From the outside to the inside:

- `driver`: listens and dials; it delivers each datagram of a socket to its link.
- `link`: connects the session of one link to its socket.
- `session`: the messages and frames of one connection, without sockets.
- `engine`: one connection with congestion control, search for the datagram size and
  fast paths.
- `connection`: the connection of aioquic; the only module that uses its private parts.

Beside them: `socket` (a UDP socket with batches), `congestion` (adapters of
`sleap_rtc.proto.quic.congestion`), and `fast_send`, `fast_receive`, `bulk` and
`packets` (bulk data that bypasses aioquic).
"""
