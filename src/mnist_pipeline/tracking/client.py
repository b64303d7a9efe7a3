"""MLflow's client with a limit on how long its calls take."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import Any, ParamSpec, TypeVar

import mlflow

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
SECONDS = 20  # that a stage spends on tracking at most, and that each call of a patient command may take


class Deadline:
    """The seconds that are left for calls: for all of them together or, if `patient`, for each of them."""

    def __init__(self, patient: bool) -> None:
        self.seconds: float = SECONDS
        self._patient = patient

    def call(
        self, function: Callable[_Arguments, _Result], *arguments: _Arguments.args, **options: _Arguments.kwargs
    ) -> _Result:
        """Return what a function returns.

        It runs in a thread of its own: nothing else ends a call that waits in C for a database or a name server, or
        that reads an answer of one byte every few seconds. A thread that takes too long is left alone.

        Raises:
            TimeoutError: the time is up.
        """
        answer: Future[_Result] = Future()

        def run() -> None:
            try:
                answer.set_result(function(*arguments, **options))
            except BaseException as error:
                answer.set_exception(error)

        begin = time.monotonic()
        if self.seconds > 0:
            Thread(target=copy_context().run, args=(run,), daemon=True).start()
        try:
            return answer.result(max(self.seconds, 0))
        except TimeoutError:
            if answer.done():  # the function itself raised it
                raise
            raise TimeoutError(f"it took more than {SECONDS} seconds") from None
        finally:
            if not self._patient:
                self.seconds -= time.monotonic() - begin


class Client:
    """All that `mlflow.MlflowClient` has; each call keeps to a deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._client = deadline.call(mlflow.MlflowClient)  # connects

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._deadline.call, getattr(self._client, name))
