"""The worker of the how-tos over a broker of files, whose children can be made to die.

A child that finds the file `die` removes it and kills itself when its transaction has committed,
before anybody has heard of the success. So the message comes again.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery.signals import task_success
from celery_app import app, transfer

FOLDER = Path(os.environ["BROKER_FOLDER"])
app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={
        "data_folder_in": str(FOLDER / "messages"),
        "data_folder_out": str(FOLDER / "messages"),
        "control_folder": str(FOLDER / "control"),
        "polling_interval": 0.05,
    },
    worker_lost_wait=0.2,
    broker_connection_retry_on_startup=True,
    worker_enable_remote_control=False,
)


@task_success.connect(weak=False)
def die(result: Any = None, **_: Any) -> None:
    if (FOLDER / "die").exists():
        (FOLDER / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)


__all__ = ["app", "transfer"]
