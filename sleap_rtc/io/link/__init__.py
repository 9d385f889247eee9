"""The parts that all kinds of link share, and the interface of a link.

From the outside to the inside:

- `link`: the interface `Link`, and its errors and statistics.
- `endpoint`: the two ends of a link, with the tasks of a server and of a client.
- `session_link`: a `Link` over a session; it owns the events and the timer.
- `session`: the state of one connection without sockets, common to all kinds.

Beside them: `limits`, `outbox` (a send queue), `addresses` and `certificates`.
"""
