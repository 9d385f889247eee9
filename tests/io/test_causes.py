"""The cause of an exception."""

from sleap_rtc.io.causes import innermost


def test_the_cause_is_found_behind_causes_and_groups() -> None:
    cause = OSError(111, "refused")
    wrapped, outer = OSError("all attempts failed"), ValueError()
    wrapped.__cause__ = ExceptionGroup("", [ExceptionGroup("", [cause])])
    outer.__cause__ = wrapped
    assert innermost(outer) is cause


def test_an_exception_without_a_cause_is_its_own() -> None:
    error = OSError()
    assert innermost(error) is error
