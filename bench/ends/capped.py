"""A `sleap-rtc` command whose QUIC datagrams have a given size.

python bench/ends/capped.py DATAGRAM_SIZE COMMAND...
"""

import sys

from sleap_rtc.io import quic_engine


def main() -> None:
    """Set the size before any other module has read it, and run the command."""
    quic_engine.DATAGRAM_SIZE = int(sys.argv.pop(1))
    from sleap_rtc.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
