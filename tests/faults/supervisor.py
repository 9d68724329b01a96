"""Starts parts of a cluster again when they have died, as systemd or a Deployment does."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Self

from sandkeeper.localcluster.cluster import OPERATOR, LocalCluster

_POLL = 0.02


class Supervisor:
    """Watches over operator and shims until the end of the block; each is started without the fault that killed it.

    deaths: how often each has died. Raises at the end of the block what a start raised.
    """

    def __init__(self, local: LocalCluster) -> None:
        self.deaths: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._local = local
        starts: dict[str, Callable[[], object]] = {OPERATOR: local.start_operator}
        for index, node in enumerate(local.nodes):
            starts[node] = lambda index=index: local.start_shim(index)  # type: ignore[misc]
        self._threads = [
            threading.Thread(target=self._keep, args=each, name=f"keeper of {each[0]}", daemon=True)
            for each in starts.items()
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if self._error is not None:
            raise self._error

    def _keep(self, name: str, start: Callable[[], object]) -> None:
        while not self._stop.wait(_POLL):
            if self._local.processes.alive(name):
                continue
            self.deaths[name] += 1
            try:
                start()
            except Exception as error:
                self._error = error
                return
