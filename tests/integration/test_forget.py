"""`syncpoint forget` on real servers: a person acknowledges, and is remembered for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.commands.demo.stage import Stage
from tests.support.left import end, leave
from tests.support.stage import ACCOUNT

WHY = ("--reason", "ticket 17: mended by hand")


def forget(config: Path, transaction: str, *options: str) -> int:
    return main(["forget", transaction, *WHY, "--config", str(config), *options])


def told(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    main([*arguments, "--config", str(config), "--json"])
    plain: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plain


def test_a_heuristic_outcome_is_acknowledged(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    accounts, ledger = leave(config, *stage.databases, account=ACCOUNT, commit=True)
    transaction = ledger.transaction
    end(stage.ledger.url, "ROLLBACK", ledger)
    recovered = told(config, capsys, "recover")
    assert recovered["exit_code"] == 4
    (incident,) = recovered["incidents"]
    assert (incident["branch"], incident["participant"]) == (ledger.branch, "ledger")
    assert incident["kind"] == "heuristic hazard" and incident["transaction"] == transaction
    command = f"syncpoint forget {transaction} --reason TEXT"
    assert (
        incident["commands"] == told(config, capsys, "show", transaction)["commands"] == [command]
    )
    assert main(["recover", "--config", str(config)]) == 4
    output, errors = capsys.readouterr()
    assert f"  type: {command}\n" in output and "1 for a person." in output
    assert errors.count("\n") == 1

    assert forget(config, transaction) == 0
    output, errors = capsys.readouterr()
    assert output == f"acknowledged: branch {ledger.branch} of ledger, heuristic hazard\n"
    assert errors == ""
    assert main(["recover", "--config", str(config)]) == 0
    assert told(config, capsys, "list")["transactions"] == []
    (kept,) = told(config, capsys, "list", "--all")["transactions"]
    assert (kept["transaction"], kept["state"], kept["phase"]) == (
        transaction, "finished", "committed",
    )  # fmt: skip
    (word,) = told(config, capsys, "show", transaction)["words"]
    assert (word["subject"], word["verdict"], word["reason"]) == (str(ledger), None, WHY[1])
    assert main(["show", transaction, "--config", str(config)]) == 0
    assert f"a person said acknowledge branch {ledger.branch}, by " in capsys.readouterr().out
    assert accounts.branch != ledger.branch and stage.prepared() == []

    assert forget(config, transaction) == 0
    assert "there is nothing to acknowledge" in capsys.readouterr().out


def test_what_is_still_prepared_is_pointed_to_resolve(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT, forgotten=True)
    assert main(["recover", "--config", str(config)]) == 4
    capsys.readouterr()
    assert forget(config, xid.transaction) == 4
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert f"syncpoint resolve {xid.transaction} --branch {xid.branch} rollback" in errors
    stage.ledger.server.stop()
    try:
        assert forget(config, xid.transaction) == 4
    finally:
        stage.ledger.server.start()
    assert "may still be prepared" in capsys.readouterr().err
    assert told(config, capsys, "show", xid.transaction)["words"] == []
    end(stage.ledger.url, "ROLLBACK", xid)
    result = told(config, capsys, "forget", xid.transaction, *WHY)
    assert result["exit_code"] == 0 and result["left"] == {}
    assert [each["gid"] for each in result["forgotten"]] == [str(xid)]
    assert main(["recover", "--config", str(config)]) == 0


def test_no_such_transaction_exits_5(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = "ffffffff-ffff-7fff-bfff-ffffffffffff"
    assert forget(config, nobody) == 5
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith(f"syncpoint: no transaction {nobody}: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["order-1", *WHY], "'order-1' is not a transaction id"),
        (["ffffffff-ffff-7fff-bfff-ffffffffffff"], "Missing option '--reason'"),
        (["ffffffff-ffff-7fff-bfff-ffffffffffff", "--reason", " "], "--reason is empty"),
    ],
)
def test_what_cannot_be_meant_exits_2(
    arguments: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", *arguments, "--config", str(config)]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and said in errors
