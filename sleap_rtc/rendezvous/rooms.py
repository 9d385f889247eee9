"""The room of this machine: its invite, and the machine that serves its signaling."""

import errno
import secrets
from collections.abc import Mapping

import msgspec

from sleap_rtc.config import (
    ConfigError,
    Settings,
    chosen_environment,
    invite_path,
    load_invite_text,
    make_state_directory,
    save_invite_text,
    state_directory,
)
from sleap_rtc.errors import UsageError
from sleap_rtc.io.link.addresses import host_and_port, reachable_hosts
from sleap_rtc.io.storage.private import write_private
from sleap_rtc.proto.errors import InvalidInput
from sleap_rtc.proto.rendezvous.invite import (
    Invite,
    decode_invite_untrusted,
    encode_invite,
)

LOOPBACK = "127.0.0.1"

_HOSTING = "signaling-address"
"""File of the state directory with the address at which a worker here serves."""


class Hosting(msgspec.Struct, frozen=True):
    """The address at which a worker of this machine runs a signaling server."""

    host: str
    port: int


def load_invite(environ: Mapping[str, str]) -> Invite | None:
    """Return the invite of the room that this machine has joined, if it has.

    Raises:
        UsageError: If the stored invite is damaged.
    """
    text = load_invite_text(environ)
    if text is None:
        return None
    try:
        return decode_invite_untrusted(text)
    except InvalidInput as error:
        raise UsageError(
            f"Cannot use the stored invite: {error.reason}.",
            f"Join again with `sleap-rtc join <invite>`, or remove "
            f"{invite_path(environ)}.",
        ) from None


def require_invite(environ: Mapping[str, str]) -> Invite:
    """Return the invite of this machine's room.

    Raises:
        UsageError: If the machine has not joined a room.
    """
    invite = load_invite(environ)
    if invite is None:
        raise UsageError(
            "This machine has not joined a room yet.",
            "Start a worker here with `sleap-rtc daemon --role worker`, or type "
            "`sleap-rtc join <invite>` with the invite that a worker printed.",
        )
    return invite


def join_room(text: str, environ: Mapping[str, str]) -> Invite:
    """Join the room of an invite, and leave the previous room.

    Raises:
        UsageError: If the invite is damaged.
        ConfigError: If it cannot be stored.
    """
    try:
        invite = decode_invite_untrusted(text)
    except InvalidInput as error:
        raise UsageError(f"Cannot join: {error.reason}.") from None
    save_invite_text(encode_invite(invite), environ)
    (state_directory(environ) / _HOSTING).unlink(missing_ok=True)
    return invite


def renew_secret(environ: Mapping[str, str]) -> Invite:
    """Replace the room of this machine by a new one at the same signaling server.

    Raises:
        UsageError: If the machine has not joined a room.
    """
    invite = Invite(require_invite(environ).url, secrets.token_bytes(32))
    save_invite_text(encode_invite(invite), environ)
    return invite


def hosting(environ: Mapping[str, str]) -> Hosting | None:
    """Return where a worker of this machine serves its room, if one does."""
    try:
        text = (state_directory(environ) / _HOSTING).read_text(encoding="ascii")
        return parse_listen_address(text.strip())
    except (FileNotFoundError, UnicodeDecodeError, UsageError):
        return None


def host_room(
    where: Hosting, environ: Mapping[str, str], public_url: str | None = None
) -> Invite:
    """Create or keep the room whose signaling a worker of this machine serves.

    Args:
        where: The address that the server is bound to, with its real port.
        environ: Environment variables.
        public_url: Its address for other machines, if not an address of this machine.

    Returns:
        The invite, stored. The secret stays the same as long as the room does.

    Raises:
        UsageError: If the public address is not one of a signaling server.
        ConfigError: If the room cannot be stored.
    """
    known = load_invite(environ)
    secret = known.secret if known else secrets.token_bytes(32)
    invite = _make_invite(public_url or _reachable_url(where), secret)
    save_invite_text(encode_invite(invite), environ)
    path = make_state_directory(environ) / _HOSTING
    try:
        write_private(
            path, f"{host_and_port(where.host, where.port)}\n".encode("ascii")
        )
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.") from None
    return invite


def room_elsewhere(settings: Settings, environ: Mapping[str, str]) -> Invite | None:
    """Return the room of a worker whose signaling server runs elsewhere.

    Returns:
        The invite that the machine has joined, or one for the configured server, which
        is made and stored if necessary. None if the worker serves the room itself.

    Raises:
        UsageError: If the configured address is not one of a signaling server.
    """
    invite = load_invite(environ)
    if invite is not None and hosting(environ) is None:
        return invite
    url = chosen_environment(settings, environ).signaling_websocket
    if url is None:
        return None
    invite = _make_invite(url, invite.secret if invite else secrets.token_bytes(32))
    save_invite_text(encode_invite(invite), environ)
    (state_directory(environ) / _HOSTING).unlink(missing_ok=True)
    return invite


def _make_invite(url: str, secret: bytes) -> Invite:
    """Make an invite to an address that a user wrote."""
    try:
        return Invite(url, secret)
    except InvalidInput as error:
        raise UsageError(f"Cannot use '{url}': {error.reason}.") from None


def parse_listen_address(text: str) -> Hosting:
    """Parse ``HOST:PORT``, with brackets around an IPv6 address.

    Raises:
        UsageError: If the text has another form.
    """
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit():
        raise UsageError(f"'{text}' is not HOST:PORT, such as 0.0.0.0:8787.")
    if int(port) > 65535:
        raise UsageError(f"{port} is not a port number (0 to 65535).")
    return Hosting(host, int(port))


def bind_problem(where: Hosting, error: OSError) -> ConfigError:
    """Return the error of a server that cannot listen, with a remedy."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"Port {where.port} of {where.host} is in use by another program. "
            "Stop it, or choose another port with --listen HOST:PORT."
        )
    return ConfigError(
        f"Cannot listen on {host_and_port(where.host, where.port)}: {error.strerror}."
    )


def _reachable_url(where: Hosting) -> str:
    """Guess the address at which other machines reach a server on this machine."""
    host = where.host
    if host in ("0.0.0.0", "::"):
        hosts = reachable_hosts(ipv4=True, ipv6=host == "::")
        # IPv4 first: all machines have it.
        host = min(hosts, key=lambda ip: ":" in ip, default=LOOPBACK)
    return f"ws://{host_and_port(host, where.port)}"
