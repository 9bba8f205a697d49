"""A FastAPI service: `uvicorn --workers 2 fastapi_app:app`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from coordinator import (
    AlreadyDecided,
    Coordinator,
    LogUnavailable,
    OutcomeUnknown,
    TransactionAborted,
    TransactionError,
)
from participants.postgres import PostgreSQL

engine = create_async_engine(os.environ["ACCOUNTS_URL"].replace("://", "+psycopg://", 1))
accounts = PostgreSQL("accounts", engine)
ledger = PostgreSQL("ledger", os.environ["LEDGER_URL"])
coordinator = Coordinator(
    os.environ.get("SYNCPOINT_LOG", "sqlite:///syncpoint.db"),
    cluster="shop",
    participants=[accounts, ledger],
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with coordinator:  # each worker opens its own, on its event loop
        yield
    await engine.dispose()


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        yield session


@dataclass
class Order:
    source: str
    target: str
    amount: int


app = FastAPI(lifespan=lifespan)
Session = Annotated[AsyncSession, Depends(get_session)]
Key = Annotated[str, Header(alias="Idempotency-Key")]


@app.post("/transfers")
@coordinator.transactional(
    timeout=5, attempts=3, idempotency_key=lambda key, **_: key, record_result=True
)
async def transfer(order: Order, session: Session, key: Key) -> dict[str, int]:
    await accounts.enlist(session)  # before its first statement
    update = text("UPDATE account SET balance = balance - :amount WHERE id = :id RETURNING balance")
    result = await session.execute(update, {"amount": order.amount, "id": order.source})
    balance = result.scalar_one_or_none()
    if balance is None:
        raise HTTPException(404, "no such account")  # any exception rolls both back
    conn = await ledger.connection()
    await conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (key, order.target, order.amount))
    return {"balance": balance}


@app.post("/deposits")
@coordinator.transactional(timeout=5, attempts=3, idempotency_key=lambda key, **_: key)
def deposit(order: Order, key: Key) -> None:  # an ordinary function: FastAPI calls it in a thread
    conn = accounts.blocking.connection()
    conn.execute(
        "UPDATE account SET balance = balance + %s WHERE id = %s", (order.amount, order.target)
    )
    conn = ledger.blocking.connection()
    conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (key, order.source, -order.amount))


@app.exception_handler(TransactionError)
async def answer(request: Request, error: TransactionError) -> JSONResponse:
    match error:
        case AlreadyDecided():  # only where no result was recorded
            return JSONResponse({"transaction": error.transaction_id, "outcome": error.outcome})
        case OutcomeUnknown():
            where = {"Location": f"/transactions/{error.transaction_id}"}
            return JSONResponse({"transaction": error.transaction_id}, 202, where)
        case TransactionAborted(retryable=True) | LogUnavailable():
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        case TransactionAborted():
            return JSONResponse({"error": str(error)}, 409)
    raise error


@app.get("/transactions/{transaction_id}")
async def status(transaction_id: str) -> dict[str, str]:
    try:
        return {"status": await coordinator.status(transaction_id)}
    except ValueError as error:
        raise HTTPException(404, str(error)) from error
