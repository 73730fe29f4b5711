"""What the control plane knows of the world, and keeps for the day when it is born while Consul is down."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from mesh.control.catalog import Catalog, Instance
from mesh.control.faults import Fault
from mesh.identity import Revoked

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """What is compiled, beside the contract and the settings."""

    catalog: Catalog
    jwks: str | None
    """JSON Web Key Set of people's tokens; None until the identity feed has been heard once."""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """What ails a service on purpose. Not kept: who is born while Consul is down makes nobody ill."""
    revoked: Revoked = field(default_factory=dict)
    """Which of their tokens are refused."""


NOTHING = Known({}, None)
_FIELDS = [each.name for each in fields(Instance)]


def load(path: Path) -> Known:
    """Read what `save` wrote; NOTHING where that is not to be had."""
    try:
        found = json.loads(path.read_text())
        catalog = {
            name: tuple(Instance(**instance) for instance in instances) for name, instances in found["catalog"].items()
        }
        revoked = {(claim, value): expiry for claim, value, expiry in found.get("revoked", [])}
        return Known(catalog, found["jwks"], revoked=revoked)
    except FileNotFoundError:
        return NOTHING
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        log.exception("%s cannot be read; beginning without it", path)
        return NOTHING


def save(path: Path, known: Known) -> None:
    """Replace the file in one step: a crash leaves the old or the new one."""
    catalog = {
        name: [{field: getattr(instance, field) for field in _FIELDS} for instance in instances]
        for name, instances in known.catalog.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    revoked = [[claim, value, expiry] for (claim, value), expiry in known.revoked.items()]
    fresh.write_text(json.dumps({"catalog": catalog, "jwks": known.jwks, "revoked": revoked}))
    fresh.replace(path)
