"""This machine's own addresses and the networks it is attached to, as its kernel tells them now."""

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterator

from server.settings import IpNetwork

# Of linux/netlink.h, linux/rtnetlink.h and linux/if_addr.h; see rtnetlink(7).
NLMSG_ERROR, NLMSG_DONE, RTM_NEWADDR, RTM_GETADDR = 2, 3, 20, 22
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
IFA_ADDRESS = 1
HEADER = struct.Struct("=IHHII")
"""Length with the header, type, flags, sequence number, port."""
INTERFACE_ADDRESS = struct.Struct("=BBBBI")
"""Family, prefix length, flags, scope, interface."""
ATTRIBUTE = struct.Struct("=HH")
"""Length with this head, type."""

REPLY_BYTES = 65_536


def is_local(address: str) -> bool:
    """Whether an address is this machine's: only its own can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_nearby(address: str) -> bool:
    """Whether an address is this machine's, or is reached without a router. Raises: OSError."""
    if is_local(address):
        return True
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in attached_networks())


def attached_networks() -> list[IpNetwork]:
    """The networks of all interfaces; none where the system is not Linux. Raises: OSError."""
    if sys.platform != "linux":
        return []
    request = INTERFACE_ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    head = HEADER.pack(HEADER.size + len(request), RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    networks: list[IpNetwork] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(head + request)
        while True:
            for kind, message in parts_of(kernel.recv(REPLY_BYTES), HEADER):
                if kind == NLMSG_ERROR:
                    raise OSError("the kernel does not list the interfaces' addresses")
                if kind == NLMSG_DONE:
                    return networks
                if kind == RTM_NEWADDR:
                    networks += networks_of(message)


def networks_of(message: bytes) -> Iterator[IpNetwork]:
    """The network of one interface's address; of a point-to-point line it is the far end's."""
    _, prefix_length, *_ = INTERFACE_ADDRESS.unpack_from(message)
    for kind, value in parts_of(message[INTERFACE_ADDRESS.size :], ATTRIBUTE):
        if kind == IFA_ADDRESS:
            yield ipaddress.ip_network((value, prefix_length), strict=False)


def parts_of(content: bytes, head: struct.Struct) -> Iterator[tuple[int, bytes]]:
    """Type and content of messages, or of attributes: each begins with its length and type, and is
    padded to 4 bytes."""
    while len(content) >= head.size:
        length, kind, *_ = head.unpack_from(content)
        yield kind, content[head.size : length]
        content = content[max(head.size, (length + 3) & ~3) :]
