"""Which route a package takes, and what happens when one does not work.

A policy only: it is asked, and answers with what to do and why. The reasons are shown
to the user, who finds them again in the troubleshooting guide.
"""

from typing import Literal

import msgspec

RoutePreference = Literal["auto", "shared", "channel"]


class TryShared(msgspec.Struct, frozen=True):
    """Find out whether both sides see the same storage, then use it."""

    reason: str


class UseChannel(msgspec.Struct, frozen=True):
    """Send the package in chunks."""

    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """No route that the user allows works."""

    reason: str


def first_route(
    preference: RoutePreference, *, client_root: bool, worker_root: bool
) -> TryShared | UseChannel | GiveUp:
    """Decide before anything is copied.

    Args:
        preference: What the user asked for.
        client_root: Whether a shared storage root is configured here.
        worker_root: Whether the worker says that it has one.
    """
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
    """Decide when the shared route turned out not to work.

    Args:
        preference: What the user asked for.
        reason: What went wrong, a sentence without its full stop.
    """
    if preference == "shared":
        return GiveUp(
            f"{reason} (the shared route was asked for, so no other is tried)"
        )
    return UseChannel(f"{reason}; falling back to RTC transfer")
