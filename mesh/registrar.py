"""Keeps in Consul what the installation's files say: the mesh's root, and what each service's token may do.

`python -m mesh.registrar`. The only process that holds Consul's management token. A wiped Consul has all of it again a
second after it is back; a replaced root or token in the secrets folder takes effect within a second, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

import consul.aio

from mesh import contract, discovery, telemetry
from mesh.config import ServiceConfig
from mesh.contract import Contract

PERIOD_SECONDS = 1.0
PREFIX = "atelier-"
_NAMES = uuid.UUID("6d2f1a53-6f0b-4d67-9f43-3b1d1c3d8a10")  # ours alone, for ids that follow from what they are of

_READ, _WRITE = {"policy": "read"}, {"policy": "write"}
_MORE: Mapping[str, Mapping[str, Any]] = {
    "control": {"service_prefix": {"": _READ}, "key_prefix": {"faults/": _READ}},
    # No service: whoever looks after the installation sees everything, and turns what is meant to be turned.
    "operator": {
        "service_prefix": {"": {**_READ, "intentions": "write"}},
        "key_prefix": {"config/": _WRITE, "faults/": _WRITE, "locks/": _READ},
        "session_prefix": {"": _READ},
    },
}

log = logging.getLogger(__name__)


class Config(ServiceConfig):
    """`REGISTRAR_…`; its token, `consul.registrar`, is the management token."""

    service: ClassVar[str] = "registrar"


def rules(service: str, contracts: Contract) -> dict[str, Any]:
    """Return what a service's token may do: be that service, read what it needs, and hold its own locks.

    Who may write a service in the registry may also have its certificate.
    """
    moving_bytes = [method for method in contracts.methods.values() if method.bytes]
    services = {f"{method.owner}-http": "read" for method in moving_bytes if service in method.callers}
    services |= {f"{method.owner}-http": "write" for method in moving_bytes if service == method.owner}
    services[service] = "write"
    return {
        "service": {name: {"policy": policy} for name, policy in sorted(services.items())},
        "node_prefix": {"": {"policy": "read"}},
        "key": {f"config/{service}": {"policy": "read"}},
        "key_prefix": {f"locks/{service}/": _WRITE},
        "session_prefix": {"": _WRITE},  # by node, and a service may run on any
        **_MORE.get(service, {}),
    }


async def reconcile(client: consul.aio.Consul, config: ServiceConfig) -> None:
    """Make Consul have the policies, tokens and root of the secrets folder, and no other tokens of ours."""
    tokens = {
        path.name.removeprefix("consul."): path.read_text().strip() for path in config.secrets_dir.glob("consul.*")
    }
    del tokens[config.service]
    await _policies(client, {name: rules(name, contract.installed()) for name in tokens})
    await _tokens(client, tokens)
    await _root(client, config)


async def _policies(client: consul.aio.Consul, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    present = {policy["Name"]: policy for policy in await client.acl.policy.list()}
    for service, allowed in wanted.items():
        name = f"{PREFIX}{service}"
        mark = hashlib.sha256(json.dumps(allowed, sort_keys=True).encode()).hexdigest()
        known = present.get(name)
        if known is None:
            await client.acl.policy.create(name, description=mark, rules=allowed)
        elif known["Description"] != mark:
            await client.acl.policy.update(known["ID"], name, description=mark, rules=allowed)
        else:
            continue
        log.info("wrote the policy %s", name)


async def _tokens(client: consul.aio.Consul, wanted: Mapping[str, str]) -> None:
    # The id follows from the secret, which is not listed: another secret is another token.
    ids = {str(uuid.uuid5(_NAMES, secret)): (service, secret) for service, secret in wanted.items()}
    present = {token["AccessorID"] for token in await client.acl.token.list() if _is_ours(token)}
    for accessor_id in ids.keys() - present:
        service, secret = ids[accessor_id]
        name = f"{PREFIX}{service}"
        await client.acl.token.create(
            accessor_id=accessor_id, secret_id=secret, policies_name=[name], description=name
        )  # fmt: skip
        log.info("wrote the token of %s", service)
    for accessor_id in present - ids.keys():
        await client.acl.token.delete(accessor_id)
        log.info("deleted the token %s, whose secret is gone", accessor_id)


def _is_ours(token: Mapping[str, Any]) -> bool:
    return str(token["Description"]).startswith(PREFIX)


async def _root(client: consul.aio.Consul, config: ServiceConfig) -> None:
    """Have the root of the secrets folder sign; Consul has the one before vouch for it, so that nobody is cut off."""
    key, certificate = config.secret("connect.key"), config.secret("connect.pem")
    known = await client.connect.ca.configuration()
    if known["Config"].get("RootCert", "").strip() != certificate:  # none where Consul made one by itself
        await client.connect.ca.update_configuration("consul", {"PrivateKey": key, "RootCert": certificate})
        log.info("another root signs from now on")


async def main(config: Config) -> None:
    telemetry.configure(config.service, config.instance)
    away = False
    async with discovery.connected(config) as client:
        while True:
            try:
                await reconcile(client, config)
                away = False
            except discovery.FAILURES as error:
                if not away:
                    log.warning("Consul cannot be brought to what it should be, yet: %s", error)
                away = True
            await asyncio.sleep(PERIOD_SECONDS)


if __name__ == "__main__":
    asyncio.run(main(Config()))
