"""The route of a package, the link that carries it, and the step after a failure.

This module only decides. The reasons of its decisions are shown to the user, and the
troubleshooting guide quotes them.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from sleap_rtc.proto.route.kinds import LINK_KINDS, LinkKindName

RoutePreference = Literal["auto", "shared", "channel", LinkKindName]
"""The route that a user asks for; a kind of link means the channel over that kind."""


class TryShared(msgspec.Struct, frozen=True):
    """Test whether both sides have the same storage, then use it."""

    reason: str


class UseChannel(msgspec.Struct, frozen=True):
    """Send the package in chunks."""

    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """Stop: no route that the user allows can work."""

    reason: str


def first_route(
    preference: RoutePreference, *, client_root: bool, worker_root: bool
) -> TryShared | UseChannel | GiveUp:
    """Choose the route before anything is copied.

    Args:
        preference: The route that the user asked for.
        client_root: Whether a shared storage root is configured here.
        worker_root: Whether the worker reports one.
    """
    if preference in LINK_KINDS:
        return UseChannel(f"the channel over {preference.upper()} was asked for")
    match preference, client_root, worker_root:
        case "channel", _, _:
            return UseChannel("the channel route was asked for")
        case _, True, True:
            return TryShared("both sides have shared storage configured")
        case "shared", False, _:
            return GiveUp(
                "Shared storage not configured here, but the shared route was asked "
                "for: set SHARED_STORAGE_ROOT or --shared-storage-root"
            )
        case "shared", True, False:
            return GiveUp(
                "Shared storage not configured on the worker, but the shared route "
                "was asked for"
            )
        case _, True, False:
            return UseChannel(
                "Shared storage not configured on the worker, will use RTC transfer"
            )
        case _:
            return UseChannel("Shared storage not configured, will use RTC transfer")


def after_shared_failure(
    preference: RoutePreference, reason: str
) -> UseChannel | GiveUp:
    """Choose the step after a failure of the shared route.

    Args:
        preference: The route that the user asked for.
        reason: The failure, a sentence without its full stop.
    """
    if preference == "shared":
        return GiveUp(
            f"{reason} (the shared route was asked for, so no other is tried)"
        )
    return UseChannel(f"{reason}; falling back to RTC transfer")


# ------------------------------------------------------------------- kinds of link


class TryLinks(msgspec.Struct, frozen=True):
    """Dial these kinds of link.

    Args:
        kinds: The preferred one first.
        reason: Why not all kinds are dialed; empty if they are.
    """

    kinds: tuple[LinkKindName, ...]
    reason: str


def asked_kinds(preference: RoutePreference) -> tuple[LinkKindName, ...]:
    """Return the kinds of link that the user allows."""
    return tuple(kind for kind in LINK_KINDS if kind == preference) or LINK_KINDS


def choose_kinds(
    preference: RoutePreference, offered: Sequence[str]
) -> TryLinks | GiveUp:
    """Choose the kinds of link to dial.

    Args:
        preference: The route that the user asked for.
        offered: The kinds that the worker listens for. A newer worker may offer kinds
            that do not exist here.
    """
    asked = asked_kinds(preference)
    kinds = tuple(kind for kind in asked if kind in offered)
    names = " and ".join(kind.upper() for kind in kinds)
    if not kinds:
        wanted = " or ".join(kind.upper() for kind in asked)
        return GiveUp(f"the worker does not listen for links over {wanted}")
    if len(asked) < len(LINK_KINDS):
        return TryLinks(kinds, "it was asked for")
    if len(kinds) < len(LINK_KINDS):
        return TryLinks(kinds, f"the worker listens for {names} only")
    return TryLinks(kinds, "")
