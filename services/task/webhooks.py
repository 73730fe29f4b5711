"""What a webhook is: where it may point to, how its requests are signed, when they are tried again. Pure.

Requests are as Standard Webhooks 1.0 says: https://github.com/standard-webhooks/standard-webhooks
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol

from mesh.errors import InvalidArgument, NotFound

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

SECRET_BYTES = 32  # Standard Webhooks asks for 24 to 64
SECRET_PREFIX = "whsec_"  # noqa: S105 - how every secret begins
BOTH_SIGN = timedelta(hours=24)  # after a rotation: longer than it takes to tell every receiver
GONE = 410
OWN_PORTS_FROM = 1024  # below are mail, shells and the like; 80 and 443 are for this

# Not reachable from everywhere, or standing for another address: IANA's registries of special addresses (RFC 6890).
_REFUSED_IPV4 = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # in no registry: what Azure's machines ask about themselves
    )
]  # fmt: skip
# All that is given to anyone lies in 2000::/3; so mapped (::ffff:0:0/96) and NAT64 addresses (64:ff9b::/96) are out.
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_REFUSED_IPV6 = [
    IPv6Network(network)
    for network in (
        "2001::/23",  # among them Teredo's, which hold an IPv4 address
        "2001:db8::/32",
        "2002::/16",  # 6to4, the same
        "3fff::/20",
    )
]

_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_URL = re.compile(
    rf"(?P<scheme>https?)://(?P<host>{_LABEL}(\.{_LABEL})*|\[(?P<ipv6>[0-9a-f:.]+)\])(:(?P<port>[0-9]{{1,5}}))?"
    r"([/?][!-\"$-\[\]-~]*)?",  # printable ASCII without '#' and the backslash
    re.IGNORECASE,
)
_NUMBER = re.compile("[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


class WebhookUrlRefused(InvalidArgument):
    reason = "WEBHOOK_URL_REFUSED"


class WebhookNotFound(NotFound):
    reason = "WEBHOOK_NOT_FOUND"


class WebhookDeliveryNotFound(NotFound):
    reason = "WEBHOOK_DELIVERY_NOT_FOUND"


class DeliveryState(enum.StrEnum):
    """Where a delivery stands."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    FAILED = "FAILED"


class Failure(enum.StrEnum):
    """Why a request did not deliver; all that its owner learns of it."""

    NO_PUBLIC_ADDRESS = "NO_PUBLIC_ADDRESS"  # also of a name that there is not: who asks must not learn of ours
    UNREACHABLE = "UNREACHABLE"
    TLS_FAILED = "TLS_FAILED"
    NO_ANSWER = "NO_ANSWER"
    REFUSED = "REFUSED"
    GONE = "GONE"
    WEBHOOK_DELETED = "WEBHOOK_DELETED"


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where an account hears of its tasks, and what every request for them is signed with."""

    user_id: str
    url: str | None
    secret: str
    previous_secret: str | None
    rotate_time: datetime | None
    create_time: datetime
    update_time: datetime

    def secrets(self, now: datetime) -> list[str]:
        """Return what signs, the newest first."""
        expire_time = self.previous_expire_time
        if self.previous_secret is None or expire_time is None or now >= expire_time:
            return [self.secret]
        return [self.secret, self.previous_secret]

    @property
    def previous_expire_time(self) -> datetime | None:
        """Until when the secret before the last rotation signs as well."""
        return None if self.rotate_time is None else self.rotate_time + BOTH_SIGN


@dataclass(frozen=True, slots=True)
class Delivery:
    """The end of a task, on its way to a webhook."""

    delivery_id: str
    user_id: str
    task_id: str
    sequence: int
    """Of the task's event."""
    kind: str
    url: str | None
    """The task's own; None for the account's, as it is when the request is made."""
    body: str
    """The same in every request, whatever became of the task since."""
    state: DeliveryState
    attempts: int
    """Requests that were begun, ever."""
    tries: int
    """Those since the task ended, or since its owner had it sent again."""
    status: int | None
    failure: Failure | None
    create_time: datetime
    attempt_time: datetime | None
    due_time: datetime
    """When a pending one may be claimed. A claim moves it by the lease, and knows by its value that it still holds."""
    expire_time: datetime
    """When the last request is due."""

    @property
    def event_id(self) -> str:
        """What receivers know it by, and other services its event: the same in every request."""
        return f"{self.task_id}/{self.sequence}"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A delivery to be made now, to `url`; None when nobody wants it any more."""

    delivery: Delivery
    url: str | None
    secrets: Sequence[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request came to: the status that answered it, or why none did."""

    status: int | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a delivery is tried."""

    first: timedelta = timedelta(seconds=10)
    """Rest after the first request; doubles with each further one."""
    longest: timedelta = timedelta(hours=4)
    whole: timedelta = timedelta(hours=24)
    lease: timedelta = timedelta(seconds=40)
    """How long what a killed replica had in hand waits for another; more than a request and its noting may take."""


PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class DeliveryQuery:
    """A page of a user's deliveries, newest first; `after` is the last page's last id."""

    user_id: str
    task_id: str | None
    after: str | None
    size: int


@dataclass(frozen=True, slots=True)
class DeliveryPage:
    """Some deliveries, the account's webhook, and whether more follow."""

    deliveries: list[Delivery]
    webhook: Webhook | None
    more: bool


class Webhooks(Protocol):
    """Where webhooks and deliveries are kept."""

    async def find(self, user_id: str) -> Webhook | None:
        """Return a user's webhook; None when there never was one."""

    async def ensure(self, user_id: str, new_secret: str) -> None:
        """See to it that a user has a secret, `new_secret` if there is none yet."""

    async def put(self, user_id: str, url: str, new_secret: str) -> Webhook:
        """Name a user's URL; likewise."""

    async def clear(self, user_id: str) -> None:
        """Forget a user's URL."""

    async def rotate(self, user_id: str, new_secret: str) -> Webhook:
        """Replace a user's secret.

        Raises:
            WebhookNotFound: there is none.
        """

    async def page(self, query: DeliveryQuery) -> DeliveryPage:
        """Return one page."""

    async def resend(self, delivery_id: str, owner: str, patience: Patience) -> tuple[Delivery, Webhook | None]:
        """Have a delivery made again; return it, and its owner's webhook.

        Raises:
            WebhookDeliveryNotFound: the owner has none such.
        """

    async def claim(self, count: int, per_user: int, busy: Collection[str], patience: Patience) -> list[Claimed]:
        """Lease up to `count` due deliveries, up to `per_user` of each user, the longest due first.

        Args:
            count: > 0.
            per_user: > 0.
            busy: users whose are left alone.
            patience: says how long they are leased.
        """

    async def settle(self, delivery: Delivery, outcome: Outcome, patience: Patience, jitter: float) -> Delivery | None:
        """Note what became of a claimed delivery; return it as it is now, None when the claim is another's by now."""

    async def release(self, delivery: Delivery) -> None:
        """Let another replica make a claimed delivery at once."""


def new_secret(key: bytes) -> str:
    """Return a secret of `SECRET_BYTES` random ones."""
    return SECRET_PREFIX + base64.b64encode(key).decode()


def headers(delivery: Delivery, secrets: Sequence[str], now: datetime) -> Mapping[str, str]:
    """Return what makes a request one of Standard Webhooks."""
    timestamp = int(now.timestamp())
    signed = f"{delivery.event_id}.{timestamp}.{delivery.body}".encode()
    return {
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signature(secret, signed) for secret in secrets),
    }


def signature(secret: str, signed: bytes) -> str:
    """Return the signature of `signed`, which is id, timestamp and body with a dot between."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def settled(delivery: Delivery, outcome: Outcome, now: datetime, *, patience: Patience, jitter: float) -> Delivery:
    """Take down what a request came to, and when the next one is due, if there is one.

    Args:
        delivery: a claimed one.
        outcome: of its request.
        now: when it ended.
        patience: says when it is tried again.
        jitter: 0..1; spreads requests that failed together over half to one and a half times the rest.
    """
    delivery = replace(delivery, status=outcome.status, failure=_failure(outcome))
    if delivery.failure is None:
        return replace(delivery, state=DeliveryState.DELIVERED)
    if delivery.failure in (Failure.GONE, Failure.WEBHOOK_DELETED) or now >= delivery.expire_time:
        return replace(delivery, state=DeliveryState.FAILED)
    return replace(delivery, due_time=min(now + rest(delivery.tries, patience, jitter), delivery.expire_time))


def resent(delivery: Delivery, now: datetime, *, patience: Patience) -> Delivery:
    """Have a delivery made again, however it stands."""
    return replace(
        delivery, state=DeliveryState.PENDING, tries=0, due_time=now, expire_time=now + patience.whole
    )  # fmt: skip


def rest(tries: int, patience: Patience, jitter: float) -> timedelta:
    """Return how long to wait after the `tries`-th request, > 0."""
    return min(patience.longest, patience.first * 2.0 ** min(tries - 1, 30)) * (0.5 + jitter)


def require_webhook(webhook: Webhook | None) -> Webhook:
    """Return `webhook`.

    Raises:
        WebhookNotFound: there is none.
    """
    if webhook is None:
        raise WebhookNotFound("You have no webhook yet: PUT one, or create a task with a webhookUrl.")
    return webhook


def require_url(url: str, field: str, allowed: Collection[Network] = ()) -> None:
    """Refuse a URL that is no plain address of the web. What its name stands for is looked at when it is used.

    Args:
        url: what somebody gave.
        field: where it stood, for the refusal.
        allowed: networks where addresses may lie that the world cannot reach.

    Raises:
        WebhookUrlRefused: with what is wrong.
    """
    wrong = _wrong(url, allowed)
    if wrong:
        raise WebhookUrlRefused(
            f"{field} {wrong}.", metadata={"field": field, "wrong": wrong}, violations={field: wrong}
        )


def is_public(address: Address) -> bool:
    """Tell whether an address means the same machine to all the world."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_IPV4)
    return address in _GLOBAL_IPV6 and not any(address in network for network in _REFUSED_IPV6)


def may_reach(address: Address, allowed: Collection[Network]) -> bool:
    """Tell whether requests may go to an address."""
    return is_public(address) or any(address in network for network in allowed)


def _wrong(url: str, allowed: Collection[Network]) -> str:
    """Say what is wrong with a URL; empty when nothing is.

    One strict form: what two parsers could read in two ways (userinfo, backslashes, blanks, other alphabets, odd
    spellings of addresses) is refused, so that all who read it see the same host.
    """
    parts = _URL.fullmatch(url)
    if parts is None:
        return (
            "must be https://host/path or http://host/path, in ASCII (other alphabets as xn--… and %…), "
            "without a user, a fragment, blanks or a final dot of the host"
        )
    port = int(parts["port"] or {"http": 80, "https": 443}[parts["scheme"].lower()])
    if port not in (80, 443) and not OWN_PORTS_FROM <= port <= 65535:
        return f"has the port {port}; it must be 80, 443, or {OWN_PORTS_FROM} to 65535"
    last = parts["host"].rpartition(".")[2]
    if parts["ipv6"] is None and not _NUMBER.fullmatch(last):
        return ""  # a name
    try:
        address = ipaddress.ip_address(parts["ipv6"] or parts["host"])
    except ValueError:
        return "has a host that is no proper address; an IPv4 address has four decimal numbers without leading zeros"
    return "" if may_reach(address, allowed) else f"has the address {address}, which all the world cannot reach"


def _failure(outcome: Outcome) -> Failure | None:
    if outcome.status is None:
        return outcome.failure
    if outcome.status == GONE:
        return Failure.GONE
    return None if 200 <= outcome.status < 300 else Failure.REFUSED
