"""What a team would write instead: one nameko service that asks another over RabbitMQ. Runs where nameko is installed.

python nameko_peer.py serve URL                                 until it is ended
python nameko_peer.py call URL CALLERS SECONDS LATENCIES        measures once, answers with a JSON object
"""

import eventlet

eventlet.monkey_patch()

import json  # noqa: E402 - what nameko uses must be patched before it is imported
import os  # noqa: E402 - likewise
import sys  # noqa: E402 - likewise
import time  # noqa: E402 - likewise

from nameko import config  # noqa: E402 - likewise
from nameko.containers import ServiceContainer  # noqa: E402 - likewise
from nameko.rpc import ServiceRpc, rpc  # noqa: E402 - likewise
from nameko.testing.services import once  # noqa: E402 - likewise

WORKERS = 64  # more than there are callers, so that no call waits for one


class Users:
    name = "users"

    @rpc
    def get_account(self, user_id):
        return {"user_id": user_id, "role": "ROLE_USER"}


class Caller:
    name = "caller"
    users = ServiceRpc("users")

    @once(*sys.argv[3:])
    def measure(self, callers, seconds, latencies):
        self.users.get_account("usr_1")
        used = time.process_time()
        began = time.perf_counter()
        end = began + float(seconds)

        def call_on():
            calls = 0
            while time.perf_counter() < end:
                self.users.get_account("usr_1")
                calls += 1
            return calls

        threads = [eventlet.spawn(call_on) for _ in range(int(callers))]
        calls = sum(thread.wait() for thread in threads)
        throughput = calls / (time.perf_counter() - began)
        used = time.process_time() - used
        taken = []
        for _ in range(int(latencies)):
            began = time.perf_counter()
            self.users.get_account("usr_1")
            taken.append(time.perf_counter() - began)
        figures = {"throughput": throughput, "median_latency": sorted(taken)[len(taken) // 2] * 1000}
        print(json.dumps({**figures, "calls": calls, "caller_seconds": used}), flush=True)
        os._exit(0)  # a container that ends while a worker of it still runs may wait for ever


def main() -> None:
    what, url = sys.argv[1:3]
    config.setup({"AMQP_URI": url, "max_workers": WORKERS, "PREFETCH_COUNT": WORKERS})
    container = ServiceContainer(Users if what == "serve" else Caller)
    container.start()
    if what == "serve":
        print("ready", flush=True)
    container.wait()


if __name__ == "__main__":
    main()
