"""The job as a Celery task: quorum queue, late acknowledgement, publisher confirms, results in PostgreSQL.

`submit COUNT JOB_SECONDS busy|waiting RATE` queues and prints what each submission took; the worker is
Celery's own command.
"""

import json
import os
import sys
import time

from celery import Celery

app = Celery("celery_peer", broker=os.environ["PEER_BROKER_URL"], backend=f"db+{os.environ['PEER_DATABASE_URL']}")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_default_queue="celery_peer",
    task_default_queue_type="quorum",
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=int(os.environ.get("PEER_PREFETCH", "32")),
)


@app.task
def job(seconds: float, waits: bool) -> None:
    if waits:
        time.sleep(seconds)
    else:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


def main() -> None:
    count, seconds, waits, rate = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "waiting", float(sys.argv[5])
    app.connection_for_write().ensure_connection()
    taken, began = [], time.perf_counter()
    for number in range(count):
        if rate:
            time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        sent = time.perf_counter()
        job.apply_async((seconds, waits))
        taken.append(time.perf_counter() - sent)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
