"""Breadth-first exploration of all states that a set of rules can reach."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass
class Exploration:
    """What an exploration found.

    `violation` says which property is violated, and `trace` tells the shortest way to it; both are
    empty if no state violates a property. `depth` is the length of the longest shortest way.
    `is_complete` is False if the exploration ended before all states were seen.
    """

    states: int = 0
    depth: int = 0
    is_complete: bool = True
    violation: str = ""
    trace: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the violation with its trace, one sentence a line."""
        steps = [f"{number}. {sentence}" for number, sentence in enumerate(self.trace, start=1)]
        return "\n".join([*steps, f"=> {self.violation}"])


def explore(
    start: S,
    moves: Callable[[S], Iterable[tuple[str, S]]],
    violated: Callable[[S], str],
    *,
    most: int,
) -> Exploration:
    """Visit each state once, in the order of its distance, until a property is violated.

    `moves` gives the moves from a state, each with a sentence; `violated` names the property that a
    state violates, if it does. The exploration ends at `most` states.
    """
    found = Exploration()
    came_from: dict[S, tuple[S, str] | None] = {start: None}
    frontier = [start]
    while frontier:
        following = list[S]()
        for state in frontier:
            for sentence, successor in moves(state):
                if successor in came_from:
                    continue
                came_from[successor] = (state, sentence)
                following.append(successor)
                if violation := violated(successor):
                    found.states, found.depth = len(came_from), found.depth + 1
                    found.violation, found.trace = violation, _trace(came_from, successor)
                    return found
            if len(came_from) >= most:
                found.states, found.is_complete = len(came_from), False
                return found
        frontier = following
        found.depth += bool(following)
    found.states = len(came_from)
    return found


def _trace(came_from: dict[S, tuple[S, str] | None], state: S) -> list[str]:
    sentences = list[str]()
    while (step := came_from[state]) is not None:
        state, sentence = step
        sentences.append(sentence)
    return sentences[::-1]
