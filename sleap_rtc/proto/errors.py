"""The two kinds of protocol fault: ours and the peer's."""


class LocalProtocolError(Exception):
    """The owner of a machine called it wrongly; the machine did not change.

    It is a bug in the caller, never the peer's fault.
    """


class RemoteProtocolError(Exception):
    """The peer broke the protocol.

    It ends at most the connection that it came in on, never the process.

    Args:
        reason: What was wrong, in words that may be sent back to the peer.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
