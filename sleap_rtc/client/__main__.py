"""``python -m sleap_rtc.client PACKAGE ...`` is ``sleap-rtc send PACKAGE ...``."""

import sys

from sleap_rtc.cli import main

if __name__ == "__main__":
    main(["send", *sys.argv[1:]])
