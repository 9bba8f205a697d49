"""Django: `gunicorn django_app:wsgi`, or `uvicorn --lifespan on django_app:asgi`."""

from __future__ import annotations

import json
import os
from typing import Any

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.exceptions import BadRequest
from django.core.wsgi import get_wsgi_application
from django.db import connection, models, transaction
from django.http import Http404, HttpRequest, JsonResponse
from django.urls import path
from django.utils.deprecation import MiddlewareMixin
from psycopg.conninfo import conninfo_to_dict

from coordinator import (
    AlreadyDecided,
    Coordinator,
    LogUnavailable,
    OutcomeUnknown,
    TransactionAborted,
)
from participants.postgres import PostgreSQL

url = conninfo_to_dict(os.environ["ACCOUNTS_URL"])
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=[f"{__name__}.Answers"],
    LOGGING={
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"console": {"class": "logging.StreamHandler"}},
        "root": {"handlers": ["console"]},
    },
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",  # on psycopg 3
            "NAME": url["dbname"],
            "USER": url["user"],
            "PASSWORD": url["password"],
            "HOST": url["host"],
            "PORT": url["port"],
            "CONN_MAX_AGE": 60,
            "ATOMIC_REQUESTS": True,
        }
    },
)
django.setup()

accounts = PostgreSQL("accounts", os.environ["ACCOUNTS_URL"])
ledger = PostgreSQL("ledger", os.environ["LEDGER_URL"])
coordinator = Coordinator(
    os.environ.get("SYNCPOINT_LOG", "sqlite:///syncpoint.db"),
    cluster="shop",
    participants=[accounts, ledger],
)


class Account(models.Model):
    id = models.TextField(primary_key=True)
    balance = models.IntegerField()

    class Meta:
        app_label = "shop"
        db_table = "account"
        managed = False


def key_of(request: HttpRequest) -> str:
    if not (key := request.headers.get("Idempotency-Key")):
        raise BadRequest("give an Idempotency-Key")
    return key


def post_transfer(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"balance": transfer(key_of(request), **json.loads(request.body))})


@coordinator.transactional(timeout=5, idempotency_key=lambda key, **_: key, record_result=True)
def transfer(key: str, source: str, target: str, amount: int) -> int:
    accounts.blocking.enlist(connection.connection)  # Django's own, before its first statement
    account = Account.objects.select_for_update().filter(id=source).first()
    if account is None:
        raise Http404(f"there is no account {source}")  # any exception rolls both back
    account.balance -= amount
    account.save()
    conn = ledger.blocking.connection()  # a psycopg.Connection
    conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (key, target, amount))
    return account.balance


@transaction.non_atomic_requests  # ATOMIC_REQUESTS is for synchronous views only
async def post_deposit(request: HttpRequest) -> JsonResponse:
    await deposit(key_of(request), **json.loads(request.body))
    return JsonResponse({})


@coordinator.transactional(timeout=5, attempts=3, idempotency_key=lambda key, **_: key)
async def deposit(key: str, source: str, target: str, amount: int) -> None:
    conn = await accounts.connection()
    await conn.execute("UPDATE account SET balance = balance + %s WHERE id = %s", (amount, target))
    conn = await ledger.connection()
    await conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (key, source, -amount))


class Answers(MiddlewareMixin):
    def process_exception(self, request: HttpRequest, error: Exception) -> JsonResponse | None:
        match error:
            case AlreadyDecided():
                return JsonResponse({"transaction": error.transaction_id})
            case OutcomeUnknown():
                return JsonResponse({"transaction": error.transaction_id}, status=202)
            case TransactionAborted(retryable=True) | LogUnavailable():
                wait = {"Retry-After": "1"}
                return JsonResponse({"error": str(error)}, status=503, headers=wait)
            case TransactionAborted():
                return JsonResponse({"error": str(error)}, status=409)
        return None


urlpatterns = [path("transfers", post_transfer), path("deposits", post_deposit)]
wsgi = get_wsgi_application()
_django = get_asgi_application()


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        await _django(scope, receive, send)
        return
    await receive()  # the server has started
    async with coordinator:
        await send({"type": "lifespan.startup.complete"})
        await receive()  # the server stops
    await send({"type": "lifespan.shutdown.complete"})
