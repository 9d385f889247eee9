"""A `sleap-rtc` command whose QUIC datagrams grow to a given size and no more.

python -m bench.ends.capped DATAGRAM_SIZE COMMAND...
"""

import sys

from sleap_rtc.proto.quic import mtu


def main() -> None:
    """Set the size before any other module has read it, and run the command."""
    mtu.LARGEST_DATAGRAM = int(sys.argv.pop(1))
    from sleap_rtc.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
