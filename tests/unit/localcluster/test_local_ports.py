"""Ports for servers: none that an outgoing connection may be given meanwhile."""

from __future__ import annotations

from pathlib import Path

from sandkeeper.localcluster.apiserver import free_ports


def test_they_are_distinct_and_not_the_kernels_to_give() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = free_ports(50)
    assert len(set(found)) == 50
    assert all(port < first or port > last for port in found) or first < 12_000
