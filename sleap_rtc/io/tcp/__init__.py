"""Links over TCP, in TLS 1.3.

From the outside to the inside:

- `driver`: listens and dials; the row of this kind in `KINDS`.
- `link`: connects the session of one link to its socket.
- `session`: the records of one connection, without sockets.
- `tls`: encrypts and decrypts for the session.

Beside them: `socket` (a TCP connection that never blocks when it sends).
"""
