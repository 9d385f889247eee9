"""What all tests share."""

import signal

from hypothesis import settings

# A shell's jobs in the background ignore interrupts, and so does whatever they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine under load is slow by chance; pytest's own timeout catches an endless loop.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
