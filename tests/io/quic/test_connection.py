"""The private state of aioquic: it exists, and one module of the package uses it."""

import ast
import inspect
from collections import deque
from pathlib import Path

import pytest
from aioquic.quic import connection as aioquic_connection
from aioquic.quic.connection import Limit, QuicConnection, QuicNetworkPath
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch
from cryptography import x509

from sleap_rtc.io.quic import connection as our_connection
from sleap_rtc.io.quic.congestion import AioquicCongestion, AioquicPacer
from sleap_rtc.io.quic.connection import AioquicConnection
from tests.io.quic.test_engine import BULK, CONTROL, MEGABYTE, Pair

THE_MODULE = Path(inspect.getfile(our_connection))
PACKAGE = THE_MODULE.parents[2]
MODULES = sorted(PACKAGE.rglob("*.py"))

Method = type(QuicConnection.close)

STATE: dict[str, type | tuple[type, ...]] = {
    "_ack_eliciting_sent_since_receipt": bool,
    "_close_at": float,
    "_close_event": (ConnectionTerminated, type(None)),
    "_close_pending": bool,
    "_cryptos": dict,
    "_events": deque,
    "_flush_builder": Method,
    "_get_or_create_stream_for_send": Method,
    "_handshake_confirmed": bool,
    "_idle_timeout": Method,
    "_local_max_data": Limit,
    "_loss": QuicPacketRecovery,
    "_max_datagram_size": int,
    "_network_paths": list,
    "_pacing_at": (float, type(None)),
    "_packet_number": int,
    "_peer_cid": aioquic_connection.QuicConnectionId,
    "_remote_max_data": int,
    "_remote_max_data_used": int,
    "_send_probe": Method,
    "_spaces": dict,
    "_state": aioquic_connection.QuicConnectionState,
    "_streams": dict,
    "_version": int,
}
"""The private attributes of a connection, with their types once it is established."""

DEEPER = {
    "_cc": lambda connection: connection._loss._cc,
    "_pacer": lambda connection: connection._loss._pacer,
    "_peer_certificate": lambda connection: connection.tls._peer_certificate,
    "_buffer": lambda connection: connection._streams[CONTROL].sender._buffer,
    "_buffer_stop": lambda connection: connection._streams[CONTROL].sender._buffer_stop,
}
"""The private attributes of the parts of a connection."""


@pytest.fixture(scope="module")
def connection() -> AioquicConnection:
    """A connection on which both kinds of streams have carried data."""
    pair = Pair()
    pair.client.send(CONTROL, b"hello")
    pair.transfer(MEGABYTE)
    return pair.client.connection


def test_the_list_has_the_attributes_that_the_module_uses() -> None:
    ours = {"_granted"}
    used = {
        node.attr
        for node in ast.walk(ast.parse(THE_MODULE.read_text()))
        if isinstance(node, ast.Attribute) and is_private(node.attr)
    }
    assert used - ours == STATE.keys() | DEEPER.keys()


@pytest.mark.parametrize("name", STATE)
def test_the_installed_aioquic_has_each_private_attribute(
    connection: AioquicConnection, name: str
) -> None:
    value = getattr(connection, name)
    kind = STATE[name]
    if kind is Method:
        assert inspect.isfunction(getattr(QuicConnection, name))
    else:
        assert isinstance(value, kind)


def test_the_containers_hold_the_expected_types(connection: AioquicConnection) -> None:
    assert isinstance(connection._cryptos[Epoch.ONE_RTT], CryptoPair)
    assert isinstance(connection._spaces[Epoch.ONE_RTT], QuicPacketSpace)
    assert isinstance(connection._network_paths[0], QuicNetworkPath)
    assert isinstance(connection._streams[BULK], QuicStream)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_cc", AioquicCongestion),
        ("_pacer", AioquicPacer),
        ("_peer_certificate", x509.Certificate),
        ("_buffer", bytearray),
        ("_buffer_stop", int),
    ],
)
def test_the_parts_have_each_private_attribute(
    connection: AioquicConnection, name: str, kind: type
) -> None:
    assert isinstance(DEEPER[name](connection), kind)


def test_aioquic_itself_sets_the_replaced_attributes() -> None:
    recovery = inspect.getsource(QuicPacketRecovery)
    assert "self._cc = " in recovery
    assert "self._pacer = " in recovery


def test_no_method_of_aioquic_is_overridden_by_accident() -> None:
    ours = {name for name in vars(AioquicConnection) if not name.startswith("__")}
    assert {name for name in ours if hasattr(QuicConnection, name)} == {
        "datagrams_to_send"
    }
    theirs = inspect.getsource(QuicConnection)
    attributes = {name for name in vars(Pair().client.connection) if "__" not in name}
    assert {name for name in attributes if f"self.{name}" not in theirs} == {"_granted"}


# ------------------------------------------------------------------- no other module


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imported_from_aioquic(tree: ast.Module) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module is not None
        and node.module.split(".")[0] == "aioquic"
        for alias in node.names
    }


def private_reads(source: str) -> set[str]:
    """Return the private attributes that a module reads of other objects.

    A class that inherits from aioquic may read those that it has set itself.
    """
    tree = ast.parse(source)
    foreign = imported_from_aioquic(tree) | {"AioquicConnection"}
    found: set[str] = set()
    attributes: list[ast.Attribute] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            attributes.append(node)
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases & foreign:
                inside = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
                own = {n.attr for n in inside if isinstance(n.ctx, ast.Store)}
                own |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                found |= {n.attr for n in inside if is_private(n.attr)} - own
    for attribute in attributes:
        if ast.unparse(attribute.value) not in ("self", "cls", "super()"):
            found.add(attribute.attr)
    return found


def uses_aioquic(source: str) -> bool:
    return "aioquic" in source or "sleap_rtc.io.quic" in source


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if m != THE_MODULE and uses_aioquic(m.read_text())],
    ids=lambda module: str(module.relative_to(PACKAGE)),
)
def test_no_other_module_reads_private_attributes(module: Path) -> None:
    assert private_reads(module.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "def f(connection): return connection._loss",
        "class A:\n def f(self): return self.connection._loss.bytes_in_flight",
        "from aioquic.quic.connection import QuicConnection\n"
        "class A(QuicConnection):\n def f(self): return self._loss",
        "from sleap_rtc.io.quic.connection import AioquicConnection\n"
        "class A(AioquicConnection):\n def f(self): return self._loss",
    ],
)
def test_a_private_attribute_is_noticed(source: str) -> None:
    assert private_reads(source) == {"_loss"}


def test_our_own_attributes_are_not_private_reads() -> None:
    source = (
        "from aioquic.quic.recovery import QuicPacketPacer\n"
        "class A(QuicPacketPacer):\n"
        " def __init__(self): self._n = 0\n"
        " def f(self): return self._n\n"
    )
    assert private_reads(source) == set()
