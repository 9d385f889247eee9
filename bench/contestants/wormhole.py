"""magic-wormhole, with a mailbox server and a transit relay of the bench's own.

The two ends find each other through the mailbox server and then connect directly, as
they do on one network. The sender's time for an empty file is subtracted.
"""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from bench.files import take_away
from bench.measures import Contestant, Load, Sample, without_connecting
from bench.ports import reserved_port
from bench.processes import (
    END_TIMEOUT,
    killed_after,
    patience,
    run_tool,
    started,
    wait_for_text,
)


class Servers(msgspec.Struct, frozen=True):
    """The servers, and the program that uses them.

    Args:
        program: The command of magic-wormhole.
        options: Its options with the addresses of the servers.
        empty: An empty file.
    """

    program: str
    options: tuple[str, ...]
    empty: Path


def wormhole(load: Load, servers: Servers) -> Contestant:
    """Make a contestant of magic-wormhole."""
    return Contestant("magic-wormhole", partial(_measure, load, servers))


@contextmanager
def open_servers(program: Path, directory: Path) -> Iterator[Servers]:
    """Run the two servers, which are plug-ins of `twist` beside the program.

    Args:
        program: The command of magic-wormhole.
        directory: An empty one for their files.

    Raises:
        BenchError: If they do not start.
    """
    database = str(directory / "mailbox.sqlite")
    with ExitStack() as stack:
        mailbox, relay = (stack.enter_context(reserved_port()) for _ in range(2))
        plugins = {
            "mailbox": (
                *("wormhole-mailbox", _endpoint(mailbox)),
                *("--channel-db", database),
            ),
            "relay": ("transitrelay", _endpoint(relay)),
        }
        for name, arguments in plugins.items():
            log = directory / f"{name}.log"
            file = stack.enter_context(log.open("w"))
            command = (str(program.with_name("twist")), *arguments)
            server = stack.enter_context(started(command, stdout=file, stderr=file))
            wait_for_text(log, "starting on", server, END_TIMEOUT)
        empty = directory / "empty"
        empty.touch()
        rendezvous = ("--relay-url", f"ws://127.0.0.1:{mailbox}/v1")
        transit = ("--transit-helper", f"tcp:127.0.0.1:{relay}")
        yield Servers(str(program), (*rendezvous, *transit), empty)


def _measure(load: Load, servers: Servers) -> Sample:
    connecting = _send(servers, servers.empty, load).seconds
    load.arrived.unlink()
    whole = _send(servers, load.path, load)
    return msgspec.structs.replace(
        whole,
        seconds=without_connecting(whole.seconds, connecting),
        is_intact=take_away(load),
        note=f"and {connecting:.1f} s to connect",
    )


def _send(servers: Servers, source: Path, load: Load) -> Sample:
    code = f"1-{secrets.token_hex(8)}"
    common = (servers.program, *servers.options)
    receive = (*common, "receive", "--hide-progress", "--accept-file")
    receive += ("-o", str(load.arrived), code)
    send = (*common, "send", "--hide-progress", "--no-qr", "--code", code, str(source))
    timeout = patience(load.size)
    with started(receive) as receiver, killed_after(timeout, receiver):
        seconds, sender = run_tool(send, timeout=timeout)
        receiver.wait()
    return Sample(seconds, sender=sender)


def _endpoint(port: int) -> str:
    return f"--port=tcp:{port}:interface=127.0.0.1"
