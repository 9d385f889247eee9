"""``python -m sleap_rtc`` is the command ``sleap-rtc``."""

from sleap_rtc.cli import main

if __name__ == "__main__":
    main()
