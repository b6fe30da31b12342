from __future__ import annotations

import ipaddress

import pytest
from cryptography import x509

from pfedsecure.errors import IdentityError
from pfedsecure.pki.names import is_role, parse_host, validate_name


@pytest.mark.parametrize("name", ["a", "Hospital-7", "x.y_z", "7", "a" * 64])
def test_allowed_names_come_back_unchanged(name: str) -> None:
    assert validate_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a" * 65, ".", "..", ".hidden", "-rf", "a/b", "a b", "a\n", "a\0", "Klinikum-Süd", "٣"]
)
def test_names_that_could_harm_a_path_or_a_log_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(IdentityError, match="is not allowed: use 1 to 64 letters") as caught:
        validate_name(name)
    assert "\n" not in str(caught.value)


def test_a_hostile_name_does_not_fill_the_log() -> None:
    with pytest.raises(IdentityError) as caught:
        validate_name("a" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("host", ["localhost", "fl.example.org", "xn--bcher-kva.example", "a-1.b2"])
def test_host_names(host: str) -> None:
    assert parse_host(host) == x509.DNSName(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "2001:db8::7"])
def test_addresses(host: str) -> None:
    assert parse_host(host) == x509.IPAddress(ipaddress.ip_address(host))


@pytest.mark.parametrize("host", ["", "*.example.org", "a..b", "-a.org", "a_b", "a b", "host:50051", "[::1]", "ä.org"])
def test_other_hosts_are_refused(host: str) -> None:
    with pytest.raises(IdentityError, match="is neither a host name nor an IP address: give"):
        parse_host(host)


def test_roles() -> None:
    assert [role for role in ("client", "server", "operator", "admin", "Client", "") if is_role(role)] == [
        "client",
        "server",
        "operator",
    ]
