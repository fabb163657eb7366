"""Finish an action even if a signal raises an exception in the middle of it."""

from collections.abc import Callable


def run_to_completion(action: Callable[[], None], attempts: int = 5) -> None:
    """Repeat an action until it ends without an exception, then raise the last exception.

    Celery's soft time limit and a cancel are exceptions that a signal handler raises between any
    two instructions. The action must allow a repetition after an interruption at any point. The
    exception of the last of `attempts` attempts is raised at once.
    """
    interruption: BaseException | None = None
    for attempt in range(attempts):
        try:
            action()
            break
        except BaseException as error:  # a signal may raise any; raised again below
            if attempt == attempts - 1:
                raise
            interruption = error
    if interruption:
        raise interruption
