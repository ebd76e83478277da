"""Which addresses may be dialled and which URLs are read at all."""

import re
from functools import partial
from ipaddress import IPv6Network, ip_address, ip_network

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.egress.policy import (
    METADATA,
    AddressDenied,
    AddressPolicy,
    IpAddress,
    UrlTooLong,
    checked_url,
    host_of,
    port_of,
    redirect_target,
    unwrap_ipv4,
)
from tests.corpora.hostile_urls import DENIED, PUBLIC

OPEN = AddressPolicy()


class TestAddressPolicy:
    @pytest.mark.parametrize("address", DENIED)
    def test_what_is_not_public_is_refused(self, address: str) -> None:
        with pytest.raises(AddressDenied):
            OPEN.check("name", [address], 443)

    @pytest.mark.parametrize("address", PUBLIC)
    def test_public_addresses_pass(self, address: str) -> None:
        assert OPEN.check("name", [address], 443) == [address]

    @pytest.mark.parametrize("bad", ["127.0.0.1", "::1", "10.0.0.1"])
    def test_one_bad_answer_spoils_all(self, bad: str) -> None:
        for answers in (["8.8.8.8", bad], [bad, "8.8.8.8"]):
            with pytest.raises(AddressDenied):
                OPEN.check("name", answers, 443)

    def test_no_answer_is_refused(self) -> None:
        for policy in (OPEN, AddressPolicy(allow_hosts=["name"])):
            with pytest.raises(AddressDenied):
                policy.check("name", [], 443)

    def test_allowed_networks_pass(self) -> None:
        policy = AddressPolicy([ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
        for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "8.8.8.8"):
            assert policy.check("name", [address], 443) == [address]
        for address in ("10.2.0.1", "fe80::1", "127.0.0.1"):
            with pytest.raises(AddressDenied):
                policy.check("name", [address], 443)

    def test_allowed_hosts_are_exact_names(self) -> None:
        policy = AddressPolicy(allow_hosts=["nas.local"])
        assert policy.check("NAS.local", ["10.0.0.1"], 443) == ["10.0.0.1"]
        for host in ("local", "x.nas.local", "nas.local.evil.example", "nas-local"):
            with pytest.raises(AddressDenied):
                policy.check(host, ["10.0.0.1"], 443)

    @pytest.mark.parametrize(
        ("address", "network"),
        [("169.254.169.254", "169.254.0.0/16"), ("169.254.169.254", "0.0.0.0/0")]
        + [("::ffff:169.254.169.254", "0.0.0.0/0"), ("fd00:ec2::254", "fd00::/8")],
    )
    def test_metadata_addresses_must_be_named_singly(self, address: str, network: str) -> None:
        assert not AddressPolicy([ip_network(network)]).allows("name", ip_address(address), 80)

    @pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254"])
    def test_metadata_addresses_named_singly_pass(self, address: str) -> None:
        assert AddressPolicy([ip_network(address)]).allows("name", ip_address(address), 80)

    def test_metadata_addresses_named_as_hosts_pass(self) -> None:
        policy = AddressPolicy(allow_hosts=["169.254.169.254", "cloud.internal"])
        metadata = ip_address("169.254.169.254")
        assert policy.allows("169.254.169.254", metadata, 80)
        assert not policy.allows("cloud.internal", metadata, 80), "a name may lead anywhere"
        assert not policy.allows("169.254.169.254", ip_address("fd00:ec2::254"), 80)

    @pytest.mark.parametrize("address", sorted(METADATA, key=str), ids=str)
    def test_no_wide_network_lets_metadata_through(self, address: IpAddress) -> None:
        policy = AddressPolicy([ip_network("0.0.0.0/0"), ip_network("::/0")])
        assert not policy.allows("name", address, 80)

    def test_this_machine_is_never_an_address(self) -> None:
        policy = AddressPolicy([ip_network("0.0.0.0/0"), ip_network("::/0")], ["0.0.0.0"])
        assert not policy.allows("0.0.0.0", ip_address("0.0.0.0"), 80)
        assert not policy.allows("name", ip_address("::"), 80)

    @pytest.mark.parametrize(
        ("port", "is_allowed"),
        [(80, True), (443, True), (8443, True), (22, False), (81, False), (8080, False)],
    )
    def test_ports_of_public_addresses(self, port: int, is_allowed: bool) -> None:
        policy = AddressPolicy(allow_ports=[8443])
        assert policy.allows("name", ip_address("8.8.8.8"), port) is is_allowed

    def test_what_an_operator_names_may_use_any_port(self) -> None:
        policy = AddressPolicy([ip_network("10.0.0.0/8")], ["nas.local"])
        assert policy.allows("name", ip_address("10.0.0.1"), 9000)
        assert policy.allows("nas.local", ip_address("8.8.8.8"), 9000)

    def test_text_that_is_no_address_is_refused(self) -> None:
        with pytest.raises(AddressDenied):
            OPEN.check("name", ["localhost"], 80)


class TestNat64:
    """The examples of RFC 6052, 2.4: 192.0.2.33 behind prefixes of each length."""

    @pytest.mark.parametrize(
        ("prefix", "address"),
        [
            ("2001:db8::/32", "2001:db8:c000:221::"),
            ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
            ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
            ("64:ff9b::/96", "64:ff9b::192.0.2.33"),
        ],
    )
    def test_embedded_address_is_found(self, prefix: str, address: str) -> None:
        found = unwrap_ipv4(ip_address(address), [IPv6Network(prefix)])
        assert found == ip_address("192.0.2.33")

    @pytest.mark.parametrize(
        ("address", "is_allowed"),
        [
            ("64:ff9b::8.8.8.8", True),
            ("64:ff9b::127.0.0.1", False),
            ("64:ff9b::10.1.2.3", True),
            ("64:ff9b::10.2.0.1", False),
            ("64:ff9b::169.254.169.254", False),
            ("64:ff9b:1::8.8.8.8", False),
        ],
    )
    def test_embedded_address_is_judged(self, address: str, is_allowed: bool) -> None:
        policy = AddressPolicy(
            [ip_network("10.1.0.0/16"), ip_network("169.254.0.0/16")],
            nat64_prefixes=[IPv6Network("64:ff9b::/96")],
        )
        assert policy.allows("name", ip_address(address), 80) is is_allowed


class TestCheckedUrl:
    @pytest.mark.parametrize(
        ("url", "host", "port"),
        [
            ("http://pictures.example/a.png", "pictures.example", 80),
            ("HTTPS://Pictures.Example:8443/a", "pictures.example", 8443),
            ("https://[2606:4700::1111]/", "2606:4700::1111", 443),
            ("https://faß.example/a.png", "xn--fa-hia.example", 443),
            ("https://a.example/?mail=me@b.example", "a.example", 443),
            ("https://a.example?mail=me@b.example", "a.example", 443),
            ("https://a.example/%20%2F", "a.example", 443),
        ],
    )
    def test_host_and_port_are_what_is_dialled(self, url: str, host: str, port: int) -> None:
        checked = checked_url(url)
        assert (host_of(checked), port_of(checked)) == (host, port)

    def test_long_urls_are_refused(self) -> None:
        base = "http://a.example/"
        assert checked_url(base + "x" * (8_192 - len(base)))
        with pytest.raises(UrlTooLong):
            checked_url(base + "x" * (8_193 - len(base)))

    @pytest.mark.parametrize(
        ("url", "target"),
        [
            ("http://a.example/my photo.png", b"/my%20photo.png"),
            ("http://a.example/x.png?a=b c&d=%20#e f", b"/x.png?a=b%20c&d=%20"),
            ("http://a.example?a b", b"/?a%20b"),
            (" http://a.example/a.png  ", b"/a.png"),
            ("http://a.example/a%20b c%2Fd+e", b"/a%20b%20c%2Fd+e"),
            ("http://a.example/100% real.png", b"/100%%20real.png"),
        ],
    )
    def test_blanks_are_escaped(self, url: str, target: bytes) -> None:
        assert checked_url(url).raw_path == target

    @given(
        scheme=st.sampled_from(["http://", "https://", "http:", "//", ""]),
        host=st.lists(
            st.sampled_from([" ", "%20", "%", "@", ":", "127.0.0.1", "8.8.8.8", "a.example", "é"])
        ),
        rest=st.text(st.sampled_from(" %2/?#@:\\aé\u3000"), max_size=12),
    )
    @example(scheme="http://", host=["8.8.8.8"], rest=" @127.0.0.1/")
    @example(scheme="http://", host=["8.8.8.8"], rest="/ @127.0.0.1/")
    @example(scheme="http://", host=["8.8.8.8"], rest="? #@127.0.0.1 /")
    def test_escaping_never_changes_the_host(self, scheme: str, host: list[str], rest: str) -> None:
        """With blanks or with `%20` a URL is refused, or read, and then at the same address as
        where all behind the host is left out."""
        text = f"{scheme}{''.join(host)}{rest}".strip(" ")
        seen = {seen_as(text), seen_as(text.replace(" ", "%20"))}
        assert len(seen) == 1
        (found,) = seen
        if found is not None:
            authority = re.split("[/?#]", text.partition("://")[2], maxsplit=1)[0]
            assert " " not in authority
            assert found == seen_as(f"{text.partition('://')[0]}://{authority}/")

    @given(st.text(max_size=20), st.sampled_from(["", "/", "?", "a/", "http://b.example/"]))
    def test_location_is_read_as_its_escaped_form_is(self, path: str, start: str) -> None:
        raw = f"{start}{path}".encode("utf-8", "replace")
        escaped = "".join(chr(each) if each < 0x7F else f"%{each:02X}" for each in raw)
        try:
            plain = redirect_target(FROM, raw.decode("latin-1"))
        except AddressDenied:
            return
        if start in ("/", "?", "a/") and path[:1] != "/" and plain.raw_host == b"a.example":
            assert plain.raw_path == redirect_target(FROM, escaped).raw_path

    @given(
        scheme=st.sampled_from(["http://", "https://", "//", ""]),
        host=st.lists(st.sampled_from(["xn--", "[", "]", ":", "@", "."]) | st.text(max_size=8)),
        rest=st.text(max_size=20),
    )
    def test_any_text_is_read_or_refused(self, scheme: str, host: list[str], rest: str) -> None:
        text = f"{scheme}{''.join(host)}/{rest}"
        header = text.encode("utf-8", "replace").decode("latin-1")
        for read, sent in ((checked_url, text), (partial(redirect_target, FROM), header)):
            try:
                checked = read(sent)
            except AddressDenied:
                continue
            assert host_of(checked)
            assert 0 < port_of(checked) < 65_536


def seen_as(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port that are dialled, None where the URL is refused."""
    try:
        checked = checked_url(url)
    except AddressDenied:
        return None
    return checked.scheme, host_of(checked), port_of(checked)


FROM = httpx2.URL("https://a.example/pictures/")
