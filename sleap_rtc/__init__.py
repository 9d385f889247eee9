"""Run SLEAP training and inference on a GPU machine elsewhere.

A *worker* daemon runs beside the GPU; a *client* sends it a job package, watches the
job run and gets the results back. The public Python API is in `sleap_rtc.client`,
`sleap_rtc.config` and `sleap_rtc.filesystem`; the protocol itself, free of any input or
output, is in `sleap_rtc.proto`.
"""

__version__ = "0.1.0"
