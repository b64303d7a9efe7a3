"""Promote the model of the working directory twice: first in a process that dies after some of its requests.

The argument says after how many of those that change the registry. Printed, as lines of JSON among what the promotions
print: how the first one ended, and the aliases after each.
"""

import json
import os
import signal
import sys
from collections.abc import Callable

from mlflow import MlflowClient

from mnist_pipeline.promotion.promote import promote_model
from mnist_pipeline.tracking.store import Store

REQUESTS = [
    "create_registered_model",
    "create_model_version",
    "set_model_version_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
]


def arm(answers: int) -> None:
    """Have this process killed as soon as so many requests are answered."""
    left = iter(range(answers - 1, -1, -1))

    def deadly(request: Callable[..., object]) -> Callable[..., object]:
        def ask(*arguments: object, **options: object) -> object:
            answer = request(*arguments, **options)
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return ask

    for name in REQUESTS:
        setattr(MlflowClient, name, deadly(getattr(MlflowClient, name)))


def tell(**found: object) -> None:
    print(json.dumps(found), flush=True)


def aliases() -> dict[str, str]:
    found = Store().client.get_registered_model("mnist").aliases
    return {alias: str(number) for alias, number in found.items()}


if __name__ == "__main__":
    if (child := os.fork()) == 0:
        arm(int(sys.argv[1]))
        promote_model("dies")
        os._exit(0)
    tell(ended=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    tell(**aliases())
    promote_model("finishes it")
    tell(**aliases())
