"""URLs that try to reach what they must not, and a resolver whose answers we choose.

In the URLs `PORT` stands for a port of 127.0.0.1 on which somebody listens and must hear nothing.
"""

import ipaddress
import socket
from collections.abc import Iterator, Sequence

DENIED = """
0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254
168.63.129.16 169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.170 192.0.2.1
192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1 192.168.255.255 192.175.48.1 198.18.0.1
198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::7f00:1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:10.0.0.1
::ffff:169.254.169.254 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8 64:ff9b::7f00:1 64:ff9b::8.8.8.8
64:ff9b:1::1 100::1 100:0:0:1::1 2001::1 2001:0:7f00:1:: 2001:10::1 2001:20::1 2001:1ff::1
2001:db8::1 2002:7f00:1:: 2002:808:808:: 2620:4f:8000::1 3fff::1 3fff:fff::1 4000::1 5f00::1 fc00::1
fd00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 febf::1 fec0::1 ff02::1 ff0e::1
""".split()

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
168.63.129.15 169.253.255.255 172.15.255.255 172.32.0.0 192.0.1.1 192.167.255.255 192.169.0.0
198.17.255.255 198.20.0.0 223.255.255.255 ::ffff:8.8.8.8 2001:200::1 2001:4860:4860::8888
2003::1 2606:4700:4700::1111 2620:4f:7fff::1 2a00:1450::1 3ffe:ffff::1
""".split()

DISGUISED = """
127.0.0.1 10.0.0.1 100.64.0.1 168.63.129.16 169.254.169.254 172.16.0.1 192.168.1.1 224.0.0.1
""".split()
"""IPv4 addresses of every class that is denied, to be written in many ways."""

URLS_OF_TWO_READINGS = [
    "http://user:secret@x/hook",
    "http://user@x/hook",
    "http://x/\r\nX-Header: y",
    "http://x/\x1b[2J",
    "http://x/a\tb",
    "http://x/\x00",
    "http://x/\x7f",
    "http://x/\x9b31m",
    "http://x/\u202egnp",
    "http://x/\u2028y",
    "http://x y/",
    "http://x /",
    "http://x:8 0/",
    "http://x/a\u00a0b",
    "http://x/a\u3000b",
    "http://x/a\ufeffb",
    "http://x\\@y/",
    "http://x%2ey/",
    "http://x:0/",
    "http://x:65536/",
    "http://xn--a/",
    "http:///hook",
]
"""Texts that parsers read in different ways, or that steer what shows them."""

FULL_WIDTH = str.maketrans("0123456789.", "０１２３４５６７８９．")
CIRCLED = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")


def disguises(address: str) -> Iterator[str]:
    """Hosts that some reader takes for the address."""
    number = int(ipaddress.IPv4Address(address))
    first, *rest = address.split(".")
    low = number & 0xFFFFFF
    halves = f"{number >> 16:x}:{number & 0xFFFF:x}"
    yield from (str(number), hex(number), f"0{number:o}", f"0x{number:X}")
    yield from (f"{first}.{low}", f"{int(first):#x}.{low:#x}", f"0{int(first):o}.0{low:o}")
    yield f"{first}.{rest[0]}.{number & 0xFFFF}"
    yield ".".join(f"{int(part):#x}" for part in (first, *rest))
    yield ".".join(f"0{int(part):o}" for part in (first, *rest))
    yield ".".join(f"{int(part):08o}" for part in (first, *rest))
    yield from (f"{address}.", f"{address}..", address.replace(".", "%2e"))
    yield "".join(f"%{ord(char):02x}" for char in address)
    yield from (address.translate(FULL_WIDTH), address.translate(CIRCLED))
    yield from (address.replace(".", "。"), address.replace(".", "｡"))
    yield f"[::ffff:{address}]"
    yield f"[::ffff:{halves}]"
    yield f"[0:0:0:0:0:FFFF:{halves}]"
    yield from (f"[::{address}]", f"[::ffff:0:{halves}]")
    yield from (f"[64:ff9b::{halves}]", f"[64:ff9b:1::{halves}]", f"[2002:{halves}::]")
    yield f"[2001:0:{halves}::]"
    yield f"[fe80::5efe:{halves}]"
    yield from (f"[{address}]", f"[::ffff:{address}%25lo]", f"[::ffff:{address}%lo]")


TRICKS = (
    """
http://localhost:PORT/ http://LOCALHOST:PORT/ http://localhost.:PORT/ https://localhost:PORT/
HTTP://127.0.0.1:PORT/ https://127.0.0.1:PORT/ http://127.0.0.01:PORT/ http://0:PORT/
http://[::1]:PORT/ http://[::]:PORT/ http://[0:0:0:0:0:0:0:1]:PORT/ http://[0000::0001]:PORT/
http://[::1%25lo]:PORT/ http://[::1%lo]:PORT/ http://[fe80::1%25lo]:PORT/ http://[v1.127]:PORT/
http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:PORT/ http://ＬＯＣＡＬＨＯＳＴ:PORT/ http://loc\u00adalhost:PORT/
http://127.0.0.1\u200b:PORT/ http://localhost\u2024:PORT/ http://127.0.0.1\uff0f:PORT/
http://127.0.0.1\uff20x:PORT/ http://127.0.0.1\uff03:PORT/ http://127.0.0.1\u2100:PORT/
http://127.0.0.1%00.example:PORT/ http://127.0.0.1%2f@x:PORT/ http://127.0.0.1%23@x:PORT/
http://user@127.0.0.1:PORT/ http://user:password@127.0.0.1:PORT/ http://8.8.8.8@127.0.0.1:PORT/
http://@127.0.0.1:PORT/ http://:@127.0.0.1:PORT/ http://8.8.8.8:80@127.0.0.1:PORT/
http://8.8.8.8%2f@127.0.0.1:PORT/ http://a@8.8.8.8@127.0.0.1:PORT/ http://8.8.8.8%40127.0.0.1:PORT/
http://8.8.8.8\\@127.0.0.1:PORT/ http://127.0.0.1:PORT\\@8.8.8.8/ http:\\\\127.0.0.1:PORT\\
http://127.0.0.1:PORT\\.8.8.8.8/ http:/\\127.0.0.1:PORT/ http://8.8.8.8\\127.0.0.1:PORT/
http://127.0.0.1:PORT#@8.8.8.8/ http://127.0.0.1:PORT?@8.8.8.8/ http://127.0.0.1:PORT/@8.8.8.8
http://127.0.0.1:PORT;@8.8.8.8/ http://127.0.0.1:PORT,8.8.8.8/ http://127.0.0.1:PORT:80/
http:///127.0.0.1:PORT/ http:127.0.0.1:PORT/ http:/127.0.0.1:PORT/ http:////127.0.0.1:PORT/
http://127.0.0.1:0PORT/ http://127.0.0.1:+PORT/ http://127.0.0.1:-1/ http://127.0.0.1:0/
http://127.0.0.1:65536/ http://127.0.0.1:99999999/ http://127.0.0.1:８０/ http://127.0.0.1:x/
//127.0.0.1:PORT/ 127.0.0.1:PORT file:///etc/passwd file://127.0.0.1:PORT/ netdoc:///etc/passwd
gopher://127.0.0.1:PORT/_x ftp://127.0.0.1:PORT/ dict://127.0.0.1:PORT/ ldap://127.0.0.1:PORT/
jar:http://127.0.0.1:PORT/!/a url:http://127.0.0.1:PORT/ view-source:http://127.0.0.1:PORT/
ws://127.0.0.1:PORT/ wss://127.0.0.1:PORT/ http+unix://127.0.0.1:PORT/ unix:///run/docker.sock
s3://127.0.0.1:PORT/ tftp://127.0.0.1:PORT/ sftp://127.0.0.1:PORT/ httpx://127.0.0.1:PORT/
data:image/png;base64,AAAA javascript:0 http:// http://: http://? http://# http://[ http://[] http://]
http://a..b/ http://.:PORT/ http://-:PORT/ http://*:PORT/ http://[::1:PORT/ http://::1:PORT/
http://metadata.internal/ http://metadata.internal./latest http://METADATA.internal/
http://private.internal:PORT/ http://loopback.example:PORT/ http://loopback6.example:PORT/
http://mixed.example/ http://mixed-first.example/ http://nat64.example/ http://mapped.example/
http://tunnelled.example/ http://shared.example/ http://zone.example/ http://none.example/
http://nonsense.example/ http://unknown.example/
http://xn--a/x.png http://xn--~/ http://xn--/ http://a.xn--a/ http://xn--a.example:PORT/
""".split()
    + [
        "",
        "http://127.0.0.1:PORT/\x00",
        "http://127.0.0.1:PORT/\r\nX: y",
        "http://8.8.8.8/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
        " http://127.0.0.1:PORT/",
        "http://127.0.0.1:PORT/\t",
        "http:// 127.0.0.1:PORT/",
        "http://8.8.8.8 127.0.0.1:PORT/",
        "ht\ntp://127.0.0.1:PORT/",
        "http://127.0.0.1\x7f:PORT/",
        "http://127.0.0.1\x85:PORT/",
        "http://127.0.0.1\u2028:PORT/",
        "http://127.0.0.1\u202e:PORT/",
        "http://127.0.0.1\ud800:PORT/",
        "http://127.0.0.1:PORT/a b",
        "http://127.0.0.1:PORT/?a=b c#d e",
        "http://127.0.0.1:PORT/ ",
        "http://127.0.0.1:PORT ",
        "http://127.0.0.1 :PORT/",
        "http://127.0.0.1: PORT/",
        "http://127.0.0.1:PORT @8.8.8.8/",
        "http://8.8.8.8 @127.0.0.1:PORT/",
        "http://8.8.8.8%20@127.0.0.1:PORT/",
        "http://8.8.8.8%20127.0.0.1:PORT/",
        "http ://127.0.0.1:PORT/",
        "http: //127.0.0.1:PORT/",
        "http:/ /127.0.0.1:PORT/",
        "//127.0.0.1:PORT/a b",
        "/\u00a0/127.0.0.1:PORT/",
        "http://127.0.0.1:PORT/\u00a0",
        "http://127.0.0.1:PORT/生成/ü b.png",
        "http://printer:PORT/a b.png",
        "http://printer.local:PORT/",
        "http://127.0.0.1:PORT/generations/0123abcd-0123-4567-89ab-0123456789ab-0.png?v=1",
        "http://127.0.0.1:PORT/" + "x" * 2_048,
        "http://127.0.0.1:PORT/" + "x y" * 2_048,
        "http://127.0.0.1:PORT/" + "x" * 8_192,
        "http://" + "a" * 2_000 + ".example:PORT/",
        "http://8.8.8.8:22/",
        "http://8.8.8.8:6379/",
        "http://[2606:4700::1111]:11211/",
    ]
)

ANSWERS = {
    "localhost": ["127.0.0.1"],
    "localhost.": ["127.0.0.1"],
    "printer": ["127.0.0.1"],
    "printer.local": ["127.0.0.1"],
    "metadata.internal": ["169.254.169.254"],
    "metadata.internal.": ["169.254.169.254"],
    "private.internal": ["10.0.0.5"],
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "mixed.example": ["8.8.8.8", "127.0.0.1"],
    "mixed-first.example": ["127.0.0.1", "8.8.8.8"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "tunnelled.example": ["2002:7f00:1::"],
    "shared.example": ["100.64.0.1"],
    "zone.example": ["fe80::1%lo"],
    "none.example": [],
    "nonsense.example": ["not an address"],
}
"""What our resolver says of names; of others it knows nothing."""


def bracketed(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address.replace('%', '%25')}]" if ":" in address else address


HOSTILE_URLS = list(
    dict.fromkeys(
        [f"http://{bracketed(address)}/" for address in DENIED]
        + [f"http://{bracketed(address)}:PORT/" for address in ("127.0.0.1", "::1")]
        + [f"http://{host}:PORT/" for address in DISGUISED for host in disguises(address)]
        + TRICKS
    )
)


def resolve_by_table(host: str, _port: int) -> Sequence[str]:
    """Names by `ANSWERS`; asks nobody."""
    if host not in ANSWERS:
        raise socket.gaierror(socket.EAI_NONAME, "unknown name")
    return ANSWERS[host]
