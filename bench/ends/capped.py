"""A `sleap-rtc` command whose QUIC datagrams grow to a given size and no more.

python -m bench.ends.capped DATAGRAM_SIZE COMMAND...
"""

import sys

from msgspec.structs import replace

from sleap_rtc.io.link import limits


def main() -> None:
    """Set the size before any other module has read it, and run the command."""
    largest = int(sys.argv.pop(1))
    limits.LIMITS = replace(limits.LIMITS, largest_datagram=largest)
    from sleap_rtc.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
