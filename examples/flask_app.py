"""A Flask service on threads: `gunicorn --workers 2 --threads 4 flask_app:app`."""

from __future__ import annotations

import os

from flask import Flask, abort, request
from flask.typing import ResponseReturnValue

from coordinator import Coordinator, LogUnavailable, OutcomeUnknown, TransactionAborted
from participants.postgres import PostgreSQL

accounts = PostgreSQL("accounts", os.environ["ACCOUNTS_URL"])
ledger = PostgreSQL("ledger", os.environ["LEDGER_URL"])
coordinator = Coordinator(
    os.environ.get("SYNCPOINT_LOG", "sqlite:///syncpoint.db"),
    cluster="shop",
    participants=[accounts, ledger],
)
app = Flask(__name__)


@app.post("/transfers")
def post_transfer() -> ResponseReturnValue:
    key = request.headers.get("Idempotency-Key") or abort(400, "give an Idempotency-Key")
    return {"balance": transfer(key, **request.get_json())}


@coordinator.transactional(
    timeout=5, attempts=3, idempotency_key=lambda key, **_: key, record_result=True
)
def transfer(key: str, source: str, target: str, amount: int) -> int:
    conn = accounts.blocking.connection()  # a psycopg.Connection
    row = conn.execute(
        "UPDATE account SET balance = balance - %s WHERE id = %s RETURNING balance",
        (amount, source),
    ).fetchone()
    if row is None:
        abort(404, f"there is no account {source}")  # any exception rolls both back
    conn = ledger.blocking.connection()
    conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (key, target, amount))
    return row[0]


@app.get("/transactions/<transaction_id>")
def status(transaction_id: str) -> ResponseReturnValue:
    try:
        return {"status": coordinator.blocking.status(transaction_id)}
    except ValueError as error:
        abort(404, str(error))


@app.errorhandler(OutcomeUnknown)
def unknown(error: OutcomeUnknown) -> ResponseReturnValue:
    where = {"Location": f"/transactions/{error.transaction_id}"}
    return {"transaction": error.transaction_id}, 202, where


@app.errorhandler(TransactionAborted)
def aborted(error: TransactionAborted) -> ResponseReturnValue:
    if error.retryable:
        return {"error": str(error)}, 503, {"Retry-After": "1"}
    return {"error": str(error)}, 409


@app.errorhandler(LogUnavailable)
def unavailable(error: LogUnavailable) -> ResponseReturnValue:
    return {"error": str(error)}, 503, {"Retry-After": "1"}
