"""Runs Envoy and replaces it without a gap: `python -m scripts.local.edge ADMIN_PORT ENVOY ARGUMENT…`.

On SIGHUP the next Envoy starts. Once it knows what it is to serve it takes over the listening sockets, and the one
before finishes what it has begun. On SIGTERM the present one finishes and all ends; on a second one, at once.
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

DRAIN_SECONDS = 5.0  # for requests under way when all is to end; a watch has no end of its own and is cut then
END_SECONDS = 5.0  # Envoy asked to end does so in a moment; killed after this
ADMIN_SECONDS = 1.0

_ENDING = {signal.SIGTERM, signal.SIGINT}
_HEARD = {signal.SIGHUP, signal.SIGCHLD, *_ENDING}


class Edge:
    """The Envoys of one edge: the present one, and before it those that have not finished yet."""

    def __init__(self, admin_port: int, command: Sequence[str]) -> None:
        self._admin_port = admin_port
        self._command = command
        self._epoch = -1
        self._envoys: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Serve until asked to end, or the present Envoy dies; return the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        self._start()
        try:
            while True:
                heard = signal.sigwait(_HEARD)
                if heard == signal.SIGHUP:
                    self._replace()
                elif heard in _ENDING:
                    self._drain()
                    return 0
                elif self._has_died():
                    return 1  # whoever runs this begins anew
        finally:
            self._end()

    def _start(self) -> None:
        self._epoch += 1
        command = [*self._command, "--restart-epoch", str(self._epoch)]
        self._envoys.append(subprocess.Popen(command, preexec_fn=_hearing))  # noqa: PLW1509 - there is one thread

    def _replace(self) -> None:
        if not self._is_live() or len(self._envoys) > 1:
            _say("The last replacement is not over yet; the present Envoy stays.")
            return
        # An Envoy that fails to start leaves the one before serving, but unable to ever be replaced.
        checked = subprocess.run([*self._command, "--mode", "validate"], preexec_fn=_hearing, check=False)
        if checked.returncode != 0:
            _say("The next Envoy would not start; the present one stays.")
            return
        self._start()

    def _has_died(self) -> bool:
        *before, present = self._envoys
        self._envoys = [*(each for each in before if each.poll() is None), present]
        return present.poll() is not None

    def _drain(self) -> None:
        """Accept no more connections, ask for no more requests, and wait for those that are there."""
        end = time.monotonic() + DRAIN_SECONDS
        self._ask("POST", "/healthcheck/fail")  # every answer from now on closes its connection
        self._ask("POST", "/drain_listeners")
        while time.monotonic() < end and self._active_requests() and not signal.sigtimedwait(_ENDING, 0.1):
            pass

    def _end(self) -> None:
        for each in self._envoys:
            each.terminate()
        for each in self._envoys:
            try:
                each.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                each.kill()

    def _is_live(self) -> bool:
        info = self._ask("GET", "/server_info")
        return bool(info) and (info["state"], info["command_line_options"]["restart_epoch"]) == ("LIVE", self._epoch)

    def _active_requests(self) -> int:
        found = self._ask("GET", "/stats?format=json&filter=^http.edge.downstream_rq_active$")
        return sum(each["value"] for each in found["stats"]) if found else 0

    def _ask(self, verb: str, path: str) -> Any:
        """Return what Envoy's admin answers, as JSON where it is; None when nobody does."""
        connection = http.client.HTTPConnection("127.0.0.1", self._admin_port, timeout=ADMIN_SECONDS)
        try:
            connection.request(verb, path)
            body = connection.getresponse().read()
            return json.loads(body) if body.startswith(b"{") else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def _hearing() -> None:
    """In the child: hear signals again. That it ends when this process does, Envoy sees to itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(Edge(int(sys.argv[1]), sys.argv[2:]).run())
