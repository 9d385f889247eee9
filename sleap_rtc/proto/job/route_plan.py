"""The decisions on the route of one job."""

import msgspec

from sleap_rtc.proto.route.routes import (
    GiveUp,
    RoutePreference,
    TryShared,
    UseChannel,
    after_shared_failure,
    first_route,
)


class RoutePlan(msgspec.Struct, frozen=True):
    """The preference of the user, and the shared storage of both sides.

    Args:
        preference: The route that the user asked for.
        client_root: Whether shared storage is configured here.
        worker_root: Whether the worker's greeting reports shared storage.
    """

    preference: RoutePreference = "auto"
    client_root: bool = False
    worker_root: bool = False

    def first(self) -> TryShared | UseChannel | GiveUp:
        """Return the decision before anything is copied."""
        return first_route(
            self.preference, client_root=self.client_root, worker_root=self.worker_root
        )

    def after_failure(self, reason: str) -> UseChannel | GiveUp:
        """Return the decision after the shared route failed for this reason."""
        return after_shared_failure(self.preference, reason)
