"""The job as a Dramatiq actor that notes its end in PostgreSQL; Dramatiq itself keeps no results there.

`submit COUNT JOB_SECONDS busy|waiting RATE` queues and prints what each submission took; the worker is
Dramatiq's own command.
"""

import json
import os
import sys
import threading
import time

import dramatiq
import psycopg
from dramatiq.brokers.rabbitmq import RabbitmqBroker

dramatiq.set_broker(RabbitmqBroker(url=os.environ["PEER_BROKER_URL"], confirm_delivery=True))
own = threading.local()


def database() -> psycopg.Connection:
    if not hasattr(own, "connection"):
        own.connection = psycopg.connect(os.environ["PEER_DATABASE_DSN"], autocommit=True)
    return own.connection


@dramatiq.actor(queue_name="dramatiq_peer")
def job(name: str, seconds: float, waits: bool) -> None:
    if waits:
        time.sleep(seconds)
    else:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
    database().execute("INSERT INTO dramatiq_done VALUES (%s) ON CONFLICT DO NOTHING", [name])


def main() -> None:
    count, seconds, waits, rate = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "waiting", float(sys.argv[5])
    assert job.broker.channel  # connections are made
    taken, began = [], time.perf_counter()
    for number in range(count):
        if rate:
            time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        sent = time.perf_counter()
        job.send(f"{began}/{number}", seconds, waits)
        taken.append(time.perf_counter() - sent)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
