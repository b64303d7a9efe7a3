"""Promote the model of the working directory twice: first in a process that dies after some of its requests.

The argument says after how many of those that change the registry. The script prints, as lines of JSON among what the
promotions print, how the first one ended, and the aliases after each.
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


def dying_requests(answers: int, die: Callable[[], object]) -> dict[str, Callable[..., object]]:
    """Return the methods of MLflow's client that change the registry, such that `die` follows the given answer."""
    left = iter(range(answers - 1, -1, -1))

    def dying(request: Callable[..., object]) -> Callable[..., object]:
        def ask(*arguments: object, **options: object) -> object:
            answer = request(*arguments, **options)
            if next(left) == 0:
                die()
            return answer

        return ask

    return {name: dying(getattr(MlflowClient, name)) for name in REQUESTS}


def print_json(**found: object) -> None:
    print(json.dumps(found), flush=True)


def aliases() -> dict[str, str]:
    found = Store().client.get_registered_model("mnist").aliases
    return {alias: str(number) for alias, number in found.items()}


if __name__ == "__main__":
    if (child := os.fork()) == 0:
        for name, method in dying_requests(int(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL)).items():
            setattr(MlflowClient, name, method)
        promote_model("dies")
        os._exit(0)
    print_json(ended=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print_json(**aliases())
    promote_model("finishes it")
    print_json(**aliases())
