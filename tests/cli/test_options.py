"""The values of options are those that the roles accept."""

from typing import get_args

import pytest

from sleap_rtc.cli import main
from sleap_rtc.proto.route.routes import RoutePreference


def test_an_unknown_route_is_refused_with_all_that_exist(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["send", "package.zip", "--route", "pigeon"])
    assert stopped.value.code == 2
    shown = capfd.readouterr().err
    for name in get_args(RoutePreference):
        assert f"'{name}'" in shown
