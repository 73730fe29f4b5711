"""On which ports an instance listened last, so that it is found there again while nobody can be told of new ones."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

from mesh.config import ServiceConfig

log = logging.getLogger(__name__)


class Ports:
    """The ports of one instance, by listener, kept on its disk."""

    def __init__(self, config: ServiceConfig) -> None:
        self._host = config.host
        self._path = config.data_dir / "ports" / f"{config.instance}.json"
        self._last = _read(self._path)

    def wanted(self, listener: str, port: int) -> int:
        """Return the port to listen on: `port`, or if that is 0 the last one, or 0 when somebody else has it now."""
        if port or not self._last.get(listener):
            return port
        try:
            socket.create_server((self._host, self._last[listener])).close()
        except OSError:
            log.info("the last port of %s is taken; listening on another", listener)
            return 0
        return self._last[listener]

    def keep(self, listener: str, port: int) -> None:
        """Remember where a listener listens; that this fails is no reason not to serve."""
        if self._last.get(listener) == port:
            return
        self._last[listener] = port
        fresh = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self._last))
            fresh.replace(self._path)
        except OSError as error:
            log.warning("the ports cannot be kept: %s", error)


def _read(path: Path) -> dict[str, int]:
    try:
        return {str(listener): int(port) for listener, port in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        log.exception("%s cannot be read; beginning without it", path)
        return {}
