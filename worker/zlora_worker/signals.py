"""What must be done whole, though a signal may raise in the middle of it."""

from collections.abc import Callable


def run_to_completion(action: Callable[[], None], attempts: int = 5) -> None:
    """Run an action that may be repeated to its end, whatever a signal raises in the middle; then raise that.

    Celery's soft time limit and a cancel are exceptions that a signal raises between any two instructions.
    """
    interruption: BaseException | None = None
    for attempt in range(attempts):
        try:
            action()
            break
        except BaseException as error:  # a signal's boundary: raised below, once the action is done
            if attempt == attempts - 1:
                raise
            interruption = error
    if interruption:
        raise interruption
