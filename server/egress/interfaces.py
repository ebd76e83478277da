"""This machine's own addresses and the networks it is attached to, as they are now."""

import ipaddress
import socket

import psutil

from server.core.settings.values import IpNetwork


def is_local(address: str) -> bool:
    """Whether an address is this machine's own, which shows in that it can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_on_link(address: str) -> bool:
    """Whether an address is this machine's or on an attached network. Raises: OSError."""
    if is_local(address):
        return True
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in attached_networks())


def attached_networks() -> list[IpNetwork]:
    """The networks of all interfaces, and the peers of point-to-point links. Raises: OSError."""
    networks: list[IpNetwork] = []
    for interface in psutil.net_if_addrs().values():
        for each in interface:
            if each.family in (socket.AF_INET, socket.AF_INET6) and each.netmask:
                bits = int(ipaddress.ip_address(each.netmask)).bit_count()
                address = each.address.partition("%")[0]
                networks.append(ipaddress.ip_network(f"{address}/{bits}", strict=False))
                if each.ptp:
                    networks.append(ipaddress.ip_network(each.ptp.partition("%")[0]))
    return networks
