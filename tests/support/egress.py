"""A client for downloads and webhooks as a server has it that listens nowhere."""

import ssl
from collections.abc import Sequence

import httpcore2

from server.core.settings.sections import EgressSettings
from server.egress.client import EgressClient, Listener
from server.egress.resolver import Resolver


def egress_client(
    settings: EgressSettings | None = None,
    *,
    listeners: Sequence[Listener] = (),
    resolver: Resolver | None = None,
    dialler: httpcore2.AsyncNetworkBackend | None = None,
    tls: ssl.SSLContext | None = None,
) -> EgressClient:
    return EgressClient(settings or EgressSettings(), listeners, resolver, dialler, tls)
