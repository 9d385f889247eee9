"""The three kinds of fault: the caller's, the peer's, and bad input."""


class LocalProtocolError(Exception):
    """The owner of a machine called it wrongly; the machine did not change.

    It is a bug in the caller, never the peer's fault.
    """


class RemoteProtocolError(Exception):
    """The peer broke the protocol.

    The connection that it came in on ends, never the process.

    Args:
        reason: The fault, in words that may be sent back to the peer.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InvalidInput(ValueError):
    """A path, a name, an invite, an offer, a script or a size is not acceptable.

    It may come from a user, a package or a peer. No connection ends for it: the caller
    turns it into an answer, such as PATH_ERROR, or into a message for people.

    Args:
        reason: The fault, in words that may be shown and sent back to the peer.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
