"""The values of options are those that the roles accept."""

from typing import get_args

from sleap_rtc.cli.commands import RouteOption
from sleap_rtc.proto.route.routes import RoutePreference


def test_every_route_can_be_chosen() -> None:
    routes = {name for part in get_args(RoutePreference) for name in get_args(part)}
    assert set(RouteOption) == routes
