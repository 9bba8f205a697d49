"""A Celery worker: `celery --app celery_app worker --pool prefork --concurrency 2`."""

from __future__ import annotations

import os

from celery import Celery, Task

from coordinator import Coordinator, TransactionError
from participants.postgres import PostgreSQL

accounts = PostgreSQL("accounts", os.environ["ACCOUNTS_URL"])
ledger = PostgreSQL("ledger", os.environ["LEDGER_URL"])
coordinator = Coordinator(
    os.environ.get("SYNCPOINT_LOG", "sqlite:///syncpoint.db"),
    cluster="shop",
    participants=[accounts, ledger],
)

app = Celery("shop", broker=os.environ.get("BROKER_URL", "amqp://"))
# A message is acknowledged when its task has ended, so that a lost worker's come again.
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)


@app.task(bind=True, autoretry_for=(TransactionError,), retry_backoff=True, max_retries=5)
def transfer(self: Task, source: str, target: str, amount: int) -> int:
    return move(self.request.id, source, target, amount)


@coordinator.transactional(
    timeout=5, attempts=3, idempotency_key=lambda request, *_: request, record_result=True
)
def move(request: str, source: str, target: str, amount: int) -> int:
    conn = accounts.blocking.connection()
    row = conn.execute(
        "UPDATE account SET balance = balance - %s WHERE id = %s RETURNING balance",
        (amount, source),
    ).fetchone()
    if row is None:
        raise LookupError(f"there is no account {source}")
    conn = ledger.blocking.connection()
    conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (request, target, amount))
    return row[0]
