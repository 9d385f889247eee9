"""``python -m sleap_rtc.worker ...`` is ``sleap-rtc daemon --role worker ...``."""

import sys

from sleap_rtc.cli import main

if __name__ == "__main__":
    main(["daemon", "--role", "worker", *sys.argv[1:]])
