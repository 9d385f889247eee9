"""What all tests share."""

import signal

# A shell's jobs in the background ignore interrupts, and so does whatever they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
