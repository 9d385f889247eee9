"""The cause of an exception."""


def innermost(error: BaseException) -> BaseException:
    """Return the cause of an exception that libraries have wrapped; itself if none."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return error
