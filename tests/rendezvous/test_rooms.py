"""The room of a machine: how it is made and joined, and where it is stored."""

import errno
import os
import secrets
import stat
import sys
from pathlib import Path

import ifaddr
import pytest

from sleap_rtc.config import ConfigError, Environment, Settings, load_invite_text
from sleap_rtc.errors import UsageError
from sleap_rtc.proto.rendezvous.invite import Invite, encode_invite
from sleap_rtc.rendezvous.rooms import (
    LOOPBACK,
    Hosting,
    bind_problem,
    host_room,
    hosting,
    join_room,
    load_invite,
    parse_listen_address,
    renew_secret,
    require_invite,
    room_elsewhere,
)

ELSEWHERE = Invite("wss://signaling.example.org/ws", secrets.token_bytes(32))
HERE = Hosting(LOOPBACK, 8787)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"SLEAP_RTC_STATE_DIR": str(tmp_path / "state")}


def configured(address: str) -> Settings:
    return Settings(environments={"production": Environment(address)})


def test_a_machine_has_not_joined_a_room_at_first(environ: dict[str, str]) -> None:
    assert load_invite(environ) is None
    assert hosting(environ) is None
    with pytest.raises(UsageError, match="has not joined a room yet"):
        require_invite(environ)
    with pytest.raises(UsageError, match="has not joined a room yet"):
        renew_secret(environ)
    assert not Path(environ["SLEAP_RTC_STATE_DIR"]).exists()


def test_a_room_keeps_its_secret_when_its_worker_starts_again(
    environ: dict[str, str],
) -> None:
    first = host_room(HERE, environ)
    assert first.url == "ws://127.0.0.1:8787"
    assert first.is_loopback
    moved = host_room(Hosting("::1", 9000), environ)
    assert moved == Invite("ws://[::1]:9000", first.secret)
    assert load_invite(environ) == moved
    assert hosting(environ) == Hosting("::1", 9000)


def test_a_public_address_is_in_the_invite(environ: dict[str, str]) -> None:
    invite = host_room(Hosting("0.0.0.0", 8787), environ, "wss://lab.example.org")
    assert invite.url == "wss://lab.example.org"
    assert not invite.is_loopback


def test_a_wildcard_address_is_not_in_the_invite(environ: dict[str, str]) -> None:
    invite = host_room(Hosting("0.0.0.0", 8787), environ)
    assert "0.0.0.0" not in invite.url
    assert invite.url.endswith(":8787")


def test_joining_a_room_leaves_the_room_of_this_machine(
    environ: dict[str, str],
) -> None:
    host_room(HERE, environ)
    assert room_elsewhere(Settings(), environ) is None
    assert join_room(encode_invite(ELSEWHERE), environ) == ELSEWHERE
    assert hosting(environ) is None
    assert require_invite(environ) == ELSEWHERE
    assert room_elsewhere(Settings(), environ) == ELSEWHERE


@pytest.mark.parametrize("text", ["", "hello", "sleap-rtc-", "sleap-rtc-AAAA"])
def test_an_invalid_invite_changes_nothing(environ: dict[str, str], text: str) -> None:
    host_room(HERE, environ)
    before = load_invite_text(environ)
    with pytest.raises(UsageError, match="Cannot join: this") as caught:
        join_room(text, environ)
    assert load_invite_text(environ) == before
    assert hosting(environ) == HERE
    assert not text or text not in str(caught.value)


def test_a_damaged_invite_names_its_file(environ: dict[str, str]) -> None:
    host_room(HERE, environ)
    path = Path(environ["SLEAP_RTC_STATE_DIR"]) / "invite"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(UsageError, match="Cannot use") as caught:
        load_invite(environ)
    assert str(path) in caught.value.hint


def test_the_configured_server_gets_a_room_that_stays(environ: dict[str, str]) -> None:
    settings = configured("ws://signaling.example.org")
    made = room_elsewhere(settings, environ)
    assert made is not None
    assert made.url == "ws://signaling.example.org"
    assert len(made.secret) == 32
    assert room_elsewhere(settings, environ) == made


def test_a_room_moves_to_the_configured_server(environ: dict[str, str]) -> None:
    own = host_room(HERE, environ)
    moved = room_elsewhere(configured("ws://signaling.example.org"), environ)
    assert moved == Invite("ws://signaling.example.org", own.secret)
    assert hosting(environ) is None


def test_a_joined_room_beats_the_configured_server(environ: dict[str, str]) -> None:
    join_room(encode_invite(ELSEWHERE), environ)
    settings = configured("ws://signaling.example.org")
    assert room_elsewhere(settings, environ) == ELSEWHERE


@pytest.mark.parametrize("url", ["lab.example.org", "ws://host#part", "ws://ho st"])
def test_an_invalid_public_address_is_a_usage_error(
    environ: dict[str, str], url: str
) -> None:
    with pytest.raises(UsageError, match=f"Cannot use '{url}': the signaling"):
        host_room(HERE, environ, url)
    assert load_invite_text(environ) is None


def test_an_invalid_configured_address_is_a_usage_error(
    environ: dict[str, str],
) -> None:
    with pytest.raises(UsageError, match="Cannot use 'ws://host#part'"):
        room_elsewhere(configured("ws://host#part"), environ)
    assert load_invite_text(environ) is None


def test_an_invite_of_the_environment_comes_first(environ: dict[str, str]) -> None:
    join_room(encode_invite(ELSEWHERE), environ)
    other = Invite("ws://127.0.0.1:9", bytes(32))
    environ["SLEAP_RTC_INVITE"] = f" {encode_invite(other)}\n"
    assert load_invite(environ) == other


def test_a_new_secret_is_another_room_at_the_same_place(
    environ: dict[str, str],
) -> None:
    old = host_room(HERE, environ)
    new = renew_secret(environ)
    assert new.url == old.url
    assert new.secret != old.secret
    assert load_invite(environ) == new
    assert hosting(environ) == HERE


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
def test_only_the_owner_can_read_the_files(environ: dict[str, str]) -> None:
    host_room(HERE, environ)
    state = Path(environ["SLEAP_RTC_STATE_DIR"])
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for file in state.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_address_that_cannot_be_stored_leaves_the_old_one(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host_room(HERE, environ)
    real_replace = os.replace

    def replace(source: str, target: Path) -> None:
        if target.name == "signaling-address":
            raise OSError(errno.ENOSPC, "No space left on device")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConfigError, match="No space left on device"):
        host_room(Hosting(LOOPBACK, 9000), environ)
    assert hosting(environ) == HERE


@pytest.mark.parametrize("content", ["", "nonsense", "é:1", "host:99999"])
def test_a_damaged_address_counts_as_none(
    environ: dict[str, str], content: str
) -> None:
    host_room(HERE, environ)
    path = Path(environ["SLEAP_RTC_STATE_DIR"]) / "signaling-address"
    path.write_text(content, encoding="utf-8")
    assert hosting(environ) is None


ADAPTERS: list[tuple[str, list[tuple[str | tuple[str, int, int], int]]]] = [
    ("lo", [("127.0.0.1", 8), (("::1", 0, 0), 128)]),
    ("link-local", [("169.254.1.1", 16), (("fe80::1", 0, 2), 64)]),
    ("vpn", [(("2001:db8::1", 0, 0), 64)]),
    ("eth0", [("192.0.2.7", 24)]),
]


def adapters(*names: str) -> list[ifaddr.Adapter]:
    return [
        ifaddr.Adapter(name, name, [ifaddr.IP(ip, prefix, name) for ip, prefix in ips])
        for name, ips in ADAPTERS
        if name in names
    ]


@pytest.mark.parametrize(
    ("host", "names", "url"),
    [
        ("0.0.0.0", ("lo", "link-local", "vpn", "eth0"), "ws://192.0.2.7:8787"),
        ("0.0.0.0", ("lo", "link-local", "vpn"), "ws://127.0.0.1:8787"),
        ("::", ("lo", "link-local", "vpn", "eth0"), "ws://192.0.2.7:8787"),
        ("::", ("lo", "link-local", "vpn"), "ws://[2001:db8::1]:8787"),
        ("::", ("lo",), "ws://127.0.0.1:8787"),
    ],
)
def test_a_wildcard_address_becomes_one_that_others_can_reach(
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    names: tuple[str, ...],
    url: str,
) -> None:
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: adapters(*names))
    assert host_room(Hosting(host, 8787), environ).url == url


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8787", Hosting("127.0.0.1", 8787)),
        ("[::]:0", Hosting("::", 0)),
        ("host.example.org:65535", Hosting("host.example.org", 65535)),
    ],
)
def test_a_listen_address_is_a_host_and_a_port(text: str, expected: Hosting) -> None:
    assert parse_listen_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "8787", ":8787", "host:", "host:http", "host:-1", "host:٣", "h:65536"]
)
def test_an_invalid_listen_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen_address(text)


def test_a_server_that_cannot_listen_gives_the_reason() -> None:
    in_use = bind_problem(HERE, OSError(errno.EADDRINUSE, "in use"))
    assert "Port 8787 of 127.0.0.1 is in use" in in_use.message
    other = bind_problem(Hosting("::1", 80), OSError(errno.EACCES, "Forbidden"))
    assert other.message == "Cannot listen on [::1]:80: Forbidden."
