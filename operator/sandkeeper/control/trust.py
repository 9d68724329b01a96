"""Certificates by the cluster's own means: requests of shims, looked at one by one; what is decided is in `signer`."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

from sandkeeper.api import SHIM_SIGNER
from sandkeeper.control.authority import Authority
from sandkeeper.control.authority import Kube as AuthorityKube
from sandkeeper.control.ports import Conflict, Gone, KubeError, Raw
from sandkeeper.control.queue import Queue
from sandkeeper.control.settings import OperatorSettings
from sandkeeper.control.signer import Account, Approve, Deny, Fail, Leave, Sign, certificate, judge
from sandkeeper.wire.certificates import cert_pem

log = logging.getLogger(__name__)

_LOOK_AGAIN = 60.0
_RETRY = 5.0


class Kube(AuthorityKube, Protocol):
    async def requests(self, signer: str) -> list[Raw]: ...
    async def get_request(self, name: str) -> Raw: ...
    async def put_request(self, name: str, part: str, body: Raw) -> Raw: ...


class Metrics(Protocol):
    """Told when a certificate (`ca`, `operator`) ends, and what became of a request (signed, denied, failed)."""

    def certificate(self, which: str, ends: datetime) -> None: ...
    def certificate_request(self, outcome: str) -> None: ...


class Trust:
    """The CA, the operator's certificate, and the shims'. `prepare`, then `run`; `event` for every request seen."""

    def __init__(
        self,
        settings: OperatorSettings,
        kube: Kube,
        metrics: Metrics | None = None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._metrics = metrics
        self._clock = clock
        self._life = timedelta(seconds=settings.certificate_life)
        self._account = Account(*_pair(settings.shim_account))
        self.authority = Authority(
            kube,
            secret=_pair(settings.ca_secret),
            config_map=_pair(settings.ca_config_map),
            life=self._life,
            clock=clock,
        )
        self.queue: Queue[str] = Queue(self.handle, concurrency=4)

    async def prepare(self) -> None:
        """Returns when there is a CA. Waits for what it needs, and says so."""
        delay = 0.5
        while not await self._refreshed():
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2 * _RETRY)

    async def run(self) -> None:
        """For ever: keeps the CA and the operator's certificate, and finds requests that no event told of."""
        again = min(_LOOK_AGAIN, self._life.total_seconds() / 10)
        while True:
            well = await self._refreshed() and await self._looked()
            await asyncio.sleep(again if well else min(again, _RETRY))

    def event(self, body: Raw) -> None:
        """A CertificateSigningRequest as a watch tells it."""
        if self._judged(body) != Leave():
            self.queue.add(body["metadata"]["name"])

    async def handle(self, name: str) -> float | None:
        """A pass over one request. Raises KubeError."""
        issuer = self.authority.issuer
        if issuer is None:
            return _RETRY
        try:
            body = await self._kube.get_request(name)
            verdict = self._judged(body)
            if isinstance(verdict, Approve):
                body = await self._kube.put_request(name, "approval", self._told(body, verdict))
                verdict = self._judged(body)
            if isinstance(verdict, Deny):
                await self._kube.put_request(name, "approval", self._told(body, verdict))
            elif isinstance(verdict, Fail):
                await self._kube.put_request(name, "status", self._told(body, verdict))
            elif isinstance(verdict, Sign):
                pem = base64.b64encode(cert_pem(certificate(verdict, issuer))).decode()
                status = {**body["status"], "certificate": pem}
                await self._kube.put_request(name, "status", {**body, "status": status})
        except Gone:
            return None
        except Conflict:
            return 0.0  # somebody else wrote: look again at what
        self._log(name, verdict)
        return None

    def _judged(self, body: Raw) -> object:
        return judge(body, self._account, self._life)

    def _told(self, body: Raw, verdict: Approve | Deny | Fail) -> Raw:
        """The request with the condition that says what was decided."""
        if isinstance(verdict, Approve):
            kind, reason = "Approved", "ShimOfNode"
            message = f"asked for by the shim of node {verdict.node}"
        else:
            kind = "Denied" if isinstance(verdict, Deny) else "Failed"
            reason, message = verdict.reason, verdict.message
        now = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {
            "type": kind,
            "status": "True",
            "reason": reason,
            "message": message,
            "lastUpdateTime": now,
        }
        status = body.get("status") or {}
        return {**body, "status": {**status, "conditions": [*(status.get("conditions") or []), condition]}}

    def _log(self, name: str, verdict: object) -> None:
        outcome = {Sign: "signed", Deny: "denied", Fail: "failed"}.get(type(verdict))
        if self._metrics is not None and outcome:
            self._metrics.certificate_request(outcome)
        if isinstance(verdict, Sign):
            log.info("Signed a shim's certificate", extra={"object_name": name, "node": verdict.node})
        elif isinstance(verdict, Deny | Fail):
            said = {"object_name": name, "reason": verdict.reason, "error": verdict.message}
            log.warning("Refused a certificate", extra=said)

    async def _refreshed(self) -> bool:
        try:
            await self.authority.refresh()
        except (KubeError, ValueError) as error:
            log.warning("The CA cannot be kept", extra={"error": str(error)})
            return False
        for which, ends in self.authority.ends().items():
            if self._metrics is not None:
                self._metrics.certificate(which, ends)
        return True

    async def _looked(self) -> bool:
        try:
            for body in await self._kube.requests(SHIM_SIGNER):
                self.event(body)
        except KubeError as error:
            log.warning("Requests for certificates cannot be listed", extra={"error": str(error)})
            return False
        return True


def _pair(text: str) -> tuple[str, str]:
    namespace, _, name = text.partition("/")
    return namespace, name
