"""The protocol by which a job has one end, as rules that can be explored.

Workers, a sidecar and a client are actors; each move of an actor is one command to Redis or one
request to the store, and is named after the function of the code that makes it, if there is one. An
actor that does not move is frozen or dead: freezes are nothing but other moves in between. What one
Lua script does is one move.

Further moves are faults: a lease expires, a process is killed, a request to the store takes effect
later although its sender has given up, Redis fails over to a replica that has lost its last writes,
or loses all that it knows of the job.

An attempt of a worker passes these steps:

| step | its move |
| --- | --- |
| `claim` | takes lease and token, or finds a verdict or another worker's lease |
| `load_end` | looks whether the manifest has a result or a verdict |
| `raise_if_over` | leaves the job if it is another attempt's or has ended; sees a cancellation |
| `report` | reports progress |
| `put_image` | creates an image, or uses the one that is stored |
| `write_result` | creates the manifest with the result |
| `end_attempt` | deletes the attempt from the record |
| `record_success` | notes the success in the record; leaves if the record has a verdict |
| `answer` | stores the end as Celery's state, which clients see |
| `require_newest` | leaves the job if it is another attempt's, before a verdict |
| `write_verdict` | creates the manifest with the verdict |
| `delete_images` | deletes an image, once the manifest has a verdict |
| `note_error` | notes a verdict that the store has not taken, and puts the message back |
| `record_verdict` | notes the verdict in the record |
| `store_retry` | stores the state RETRY, or leaves the job |
| `send_again` | sends the message again, and releases the lease |

Steps with a name of their own, and the code that makes them:

| step | code |
| --- | --- |
| `put_image` | `ImageUploader._put` |
| `store_retry` | `send_for_retry` |
| `answer` | Celery's result backend |
| `wait_for_sidecar` | `JobStore.request_end` |
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from protocol.explore import Exploration, explore

SIDECAR: Final = "the sidecar"
CLIENT: Final = "the client"
WORKERS: Final = ("worker A", "worker B", "worker C")

GONE: Final = "gone"  # step of an actor that does nothing any more
RESULT: Final = "a result"  # kind of an end; every other kind is a verdict
REVOKED: Final = "revoked"
EXPIRED: Final = "expired"
STRANGE: Final = "something else"  # content of an image that no attempt of this job has drawn

PENDING: Final = "PENDING"
PROGRESS: Final = "PROGRESS"
RETRY: Final = "RETRY"

MANIFEST: Final = "the manifest"

Image = tuple[str, str]  # key, and the actor that drew it


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The protections of the protocol. Each can be switched off."""

    writes_verdicts: bool = True  # a verdict is created under the manifest's key, too
    waits_for_store: bool = True  # a verdict that the store has not taken is not shown
    deletes_last: bool = True  # images are deleted only after a verdict is in the manifest
    keeps_stored_images: bool = True  # an attempt deletes no image at its start
    keeps_strange_images: bool = True  # an attempt deletes no image that it cannot use
    checks_end: bool = True  # RETRY and PROGRESS are not stored after the end
    undoes_own_mark: bool = True  # only the newest attempt deletes its mark `begun`
    checks_token: bool = True  # an attempt leaves the job if its token is not the newest
    client_looks_for_begun: bool = True  # a client ends no job by itself that was ever begun
    sidecar_marks: bool = True  # a sidecar marks a job in the record before its verdict


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much may happen."""

    workers: int = 2
    images: int = 1
    errors: int = 1  # errors while a job is drawn
    deaths: int = 1  # processes that are killed, and whose death is noted
    late: int = 1  # requests to the store that take effect later, or never
    losses: int = 0  # times that Redis loses what it has answered
    expires: bool = True  # the job has a time until which an attempt must have begun
    has_replies: bool = False  # a client that cancels always gets the reply of a sidecar
    has_strange_image: bool = False  # an image of another job is stored at the start


class End(NamedTuple):
    """An end of the job: a result with its images, or a verdict."""

    kind: str
    by: str = ""
    images: frozenset[Image] = frozenset()

    def __str__(self) -> str:
        return f"{self.kind} of {self.by}" if self.by else self.kind


class Redis(NamedTuple):
    """What Redis has of the job: its record, its lease, and Celery's state of it."""

    is_known: bool = True
    token: str = ""  # the worker that claimed last: each worker claims once
    lease: str = ""
    running: frozenset[str] = frozenset()
    has_begun: bool = False
    is_ending: bool = False  # a sidecar is about to end the job
    is_cancelled: bool = False
    failing: End | None = None  # a verdict that the store has not taken
    verdict: End | None = None
    is_closed: bool = False
    celery_state: str | End = PENDING


class Request(NamedTuple):
    """A request to the store that has not taken effect yet; `content` is None in a deletion."""

    sender: str
    key: str
    content: str | End | None


class Store(NamedTuple):
    """What the store has of the job."""

    images: frozenset[Image] = frozenset()
    manifest: End | None = None
    late: frozenset[Request] = frozenset()

    def image(self, key: str) -> str | None:
        """Return what is stored under the key of an image."""
        return next((content for name, content in self.images if name == key), None)


class Actor(NamedTuple):
    """A worker, the sidecar or the client: its next step, and what it knows."""

    name: str
    step: str
    is_resumed: bool = False  # images of earlier attempts may be used
    is_first: bool = False  # the attempt has set the mark `begun`, and has drawn nothing
    is_apart: bool = False  # the next image gets the attempt's own key
    images: frozenset[Image] = frozenset()
    end: End | None = None  # with which the actor ends the job
    is_decided: bool = False  # the manifest has that end


class State(NamedTuple):
    """A state of everything; `errors`, `deaths`, `late` and `losses` are what may still happen."""

    redis: Redis
    store: Store
    actors: tuple[Actor, ...]
    errors: int
    deaths: int
    late: int
    losses: int
    replica: Redis | None = None  # a Redis that has fallen behind
    shown: tuple[End, ...] = ()  # all ends that a client could have seen
    is_overwritten: bool = False  # an end was overwritten by a state of a job that goes on


Moves = Iterator[tuple[str, State]]


class Protocol:
    """The moves of all actors, and all faults, by some rules and within some bounds."""

    def __init__(self, rules: Rules, bounds: Bounds) -> None:
        self.rules, self.bounds = rules, bounds

    def start(self) -> State:
        """Return the state in which the job was submitted, and its message is in the queue."""
        workers = [Actor(name, "claim") for name in WORKERS[: self.bounds.workers]]
        images = frozenset({(_key(0), STRANGE)} if self.bounds.has_strange_image else ())
        return State(
            redis=Redis(),
            store=Store(images),
            actors=(*workers, Actor(SIDECAR, "serve"), Actor(CLIENT, "cancel")),
            errors=self.bounds.errors,
            deaths=self.bounds.deaths,
            late=self.bounds.late,
            losses=self.bounds.losses,
        )

    def moves(self, state: State) -> Moves:
        """Yield all moves from a state, each with a sentence."""
        for me, actor in enumerate(state.actors):
            if actor.step != GONE:
                yield from getattr(self, actor.step)(state, me)
        yield from self._faults(state)

    # An attempt of a worker

    def claim(self, state: State, me: int) -> Moves:
        """Take the job. Workers are alike: they claim in the order of their names."""
        redis, name = state.redis, state.actors[me].name
        if me > 0 and state.actors[me - 1].step == "claim":
            return
        if redis.verdict is not None:
            found = _goes_to_end(state, me, "write_verdict", redis.verdict)
            yield f"{name} finds the verdict {redis.verdict} in the record", found
        elif redis.lease:
            yield f"{name} finds that the job is leased", _goes(state, me, "load_end_elsewhere")
        else:
            claimed = _goes(
                state,
                me,
                "load_end",
                is_resumed=redis.has_begun,
                is_first=not redis.has_begun,
            )
            record = _redis(
                claimed,
                is_known=True,
                token=name,
                lease=name,
                running=redis.running | {name},
                has_begun=True,
            )
            yield f"{name} claims the job, and gets a new token", record

    def load_end(self, state: State, me: int) -> Moves:
        """Look for an end in the manifest."""
        actor, manifest = state.actors[me], state.store.manifest
        if manifest is not None:
            yield f"{actor.name} finds {manifest} in the manifest", _decided(state, me, manifest)
            return
        if state.redis.failing is not None:
            failing = _goes_to_end(state, me, "require_newest", state.redis.failing)
            yield f"{actor.name} finds no manifest, and an error that waits for the store", failing
            return
        deletes = not (self.rules.keeps_stored_images or actor.is_resumed)
        following = "delete_stored" if deletes else "raise_if_over"
        yield f"{actor.name} finds no manifest", _goes(state, me, following)

    def load_end_elsewhere(self, state: State, me: int) -> Moves:
        """Look for the end of a job that is leased; without one the message waits."""
        name, manifest = state.actors[me].name, state.store.manifest
        if manifest is not None:
            yield f"{name} finds {manifest} in the manifest", _decided(state, me, manifest)
        else:
            yield f"{name} puts the message back", _goes(state, me, "claim")

    def raise_if_over(self, state: State, me: int) -> Moves:
        """Leave the job if it must not go on: at each step, and before the manifest."""
        actor, redis = state.actors[me], state.redis
        if self._is_lost(state, me) or (redis.is_closed and redis.verdict is None):
            yield f"{actor.name} finds that the job is over, and leaves it", self._leaves(state, me)
        elif redis.verdict is not None:
            ended = _goes_to_end(state, me, "require_newest", redis.verdict)
            yield f"{actor.name} finds the verdict {redis.verdict} in the record", ended
        elif redis.is_cancelled:
            revoked = _goes_to_end(state, me, "require_newest", End(REVOKED))
            yield f"{actor.name} finds that the job is cancelled", revoked
        elif len(actor.images) == self.bounds.images:
            yield f"{actor.name} finds that the job goes on", _goes(state, me, "write_result")
        else:
            drawing = _goes(state, me, "report", is_first=False)
            yield f"{actor.name} finds that the job goes on", drawing

    def report(self, state: State, me: int) -> Moves:
        """Store PROGRESS, and draw the next image, which may fail."""
        name = state.actors[me].name
        if self._may_store_state(state, me):
            state = _shows_state(state, PROGRESS)
        yield f"{name} reports progress, and draws an image", _goes(state, me, "put_image")
        if state.errors:
            state = state._replace(errors=state.errors - 1)
            yield from self._fails(state, me, "cannot draw")

    def put_image(self, state: State, me: int) -> Moves:
        """Create the next image; use the stored one if there is one that can be used."""
        actor, store = state.actors[me], state.store
        index = len(actor.images)
        key = _key(index, actor.name) if actor.is_apart else _key(index)
        stored = store.image(key)
        if stored is None:
            put = state._replace(store=store._replace(images=store.images | {(key, actor.name)}))
            yield f"{actor.name} stores the image {key}", _has_image(put, me, (key, actor.name))
            yield from self._late(state, me, key, actor.name)
        elif stored == actor.name or (actor.is_resumed and stored != STRANGE):
            used = _has_image(state, me, (key, stored))
            yield f"{actor.name} uses the image {key} of {stored}", used
        elif stored == STRANGE and not self.rules.keeps_strange_images:
            yield f"{actor.name} cannot use the image {key}", _goes(state, me, "delete_strange")
        else:
            apart = _goes(state, me, "put_image", is_apart=True)
            yield f"{actor.name} cannot use the image {key}, and takes a key of its own", apart

    def write_result(self, state: State, me: int) -> Moves:
        """Create the manifest with the result, or follow the end that the manifest has."""
        actor, manifest = state.actors[me], state.store.manifest
        result = End(RESULT, actor.name, actor.images)
        if manifest is not None:
            yield f"{actor.name} finds {manifest} in the manifest", _decided(state, me, manifest)
            return
        written = state._replace(store=state.store._replace(manifest=result))
        yield f"{actor.name} writes {result} into the manifest", _decided(written, me, result)
        yield from self._late(state, me, MANIFEST, result)

    def end_attempt(self, state: State, me: int) -> Moves:
        """Delete the attempt from the record."""
        name = state.actors[me].name
        ended = self._forgets(state, me)
        yield f"{name} ends its attempt", _goes(ended, me, "record_success", is_first=False)

    def record_success(self, state: State, me: int) -> Moves:
        """Note the success in the record, and leave the job if the record has a verdict."""
        name, noted = state.actors[me].name, _redis(state, is_closed=True)
        if name == SIDECAR or state.redis.verdict is not None:
            yield f"{name} notes the success in the record, and leaves", self._leaves(noted, me)
        else:
            yield f"{name} notes the success in the record", _goes(noted, me, "answer")

    def answer(self, state: State, me: int) -> Moves:
        """Store the end as Celery's state."""
        actor = state.actors[me]
        assert actor.end is not None
        shown = _shows_end(state, actor.end)
        shown = _redis(self._forgets(shown, me), celery_state=actor.end)
        sentence = f"{actor.name} shows {actor.end} to clients"
        if actor.name == SIDECAR:
            yield sentence, _goes(shown, me, "record_verdict")
        else:
            yield sentence, _ends(shown, me)

    def store_retry(self, state: State, me: int) -> Moves:
        """Store RETRY, if the job is still this attempt's."""
        name = state.actors[me].name
        if self._may_store_state(state, me):
            stored = _shows_state(state, RETRY)
            yield f"{name} stores the state RETRY", _goes(stored, me, "send_again")
        else:
            yield f"{name} finds that the job is over, and leaves it", self._leaves(state, me)

    def send_again(self, state: State, me: int) -> Moves:
        """Send the message again, end the attempt, and release the lease."""
        name, redis = state.actors[me].name, state.redis
        released = _redis(state, lease="" if redis.lease == name else redis.lease)
        yield f"{name} sends the message again, and releases the lease", self._leaves(released, me)

    # An end with a verdict

    def require_newest(self, state: State, me: int) -> Moves:
        """Leave the job if another attempt has claimed it."""
        name = state.actors[me].name
        if self._is_lost(state, me):
            yield f"{name} finds that its token is old, and leaves", self._leaves(state, me)
        elif not self.rules.writes_verdicts:
            yield f"{name} finds that its token is the newest", _goes(state, me, "look_for_result")
        elif not self.rules.deletes_last:
            yield f"{name} finds that its token is the newest", _goes(state, me, "delete_images")
        else:
            yield f"{name} finds that its token is the newest", _goes(state, me, "write_verdict")

    def write_verdict(self, state: State, me: int) -> Moves:
        """Create the manifest with the verdict, or follow the end that the manifest has."""
        actor, manifest = state.actors[me], state.store.manifest
        assert actor.end is not None
        if manifest is not None:
            yield f"{actor.name} finds {manifest} in the manifest", _decided(state, me, manifest)
            return
        written = state._replace(store=state.store._replace(manifest=actor.end))
        yield f"{actor.name} writes {actor.end} into the manifest", _decided(written, me, actor.end)
        yield from self._late(state, me, MANIFEST, actor.end)

    def note_error(self, state: State, me: int) -> Moves:
        """Note a verdict that the store has not taken, and put the message back."""
        actor = state.actors[me]
        if self._is_lost(state, me):
            yield f"{actor.name} finds that its token is old, and leaves", self._leaves(state, me)
        else:
            noted = self._leaves(_redis(state, failing=actor.end), me)
            yield f"{actor.name} notes the error, and puts the message back", noted

    def delete_images(self, state: State, me: int) -> Moves:
        """Delete one image after the other, then go on."""
        actor, store = state.actors[me], state.store
        if not store.images:
            must_decide = self.rules.writes_verdicts and not actor.is_decided
            following = "write_verdict" if must_decide else "record_verdict"
            yield f"{actor.name} finds no image", _goes(state, me, following)
            return
        image = min(store.images)
        deleted = state._replace(store=store._replace(images=store.images - {image}))
        yield f"{actor.name} deletes the image {image[0]}", deleted
        if state.late:
            request = Request(actor.name, image[0], None)
            sent = state._replace(
                store=store._replace(late=store.late | {request}), late=state.late - 1
            )
            yield (
                f"{actor.name} gives up the deletion of {image[0]}, which is on its way",
                _goes(sent, me, "record_verdict"),
            )

    def record_verdict(self, state: State, me: int) -> Moves:
        """Note the verdict in the record; the first one stays."""
        actor = state.actors[me]
        assert actor.end is not None
        verdict = state.redis.verdict or actor.end
        noted = _redis(_shows_end(state, verdict), verdict=verdict, is_closed=True)
        sentence = f"{actor.name} notes the verdict in the record, which says {verdict}"
        if actor.name == SIDECAR:
            yield sentence, _ends(noted, me)
        else:
            yield sentence, _goes_to_end(noted, me, "answer", verdict)

    # Steps of an attempt whose protections are switched off

    def look_for_result(self, state: State, me: int) -> Moves:
        """Look for a result in the manifest, as if a look were a decision."""
        name, manifest = state.actors[me].name, state.store.manifest
        if manifest is not None:
            yield f"{name} finds {manifest} in the manifest", _decided(state, me, manifest)
        else:
            yield f"{name} finds no manifest", _goes(state, me, "delete_images")

    def delete_stored(self, state: State, me: int) -> Moves:
        """Delete what an earlier job may have left, at the start of an attempt."""
        store = state.store
        kept = frozenset(image for image in store.images if image[0] != _key(0))
        deleted = state._replace(store=store._replace(images=kept))
        name = state.actors[me].name
        yield f"{name} deletes what is under {_key(0)}", _goes(deleted, me, "raise_if_over")

    def delete_strange(self, state: State, me: int) -> Moves:
        """Delete an image that cannot be used, and store another one."""
        store, key = state.store, _key(len(state.actors[me].images))
        kept = frozenset(image for image in store.images if image[0] != key)
        deleted = state._replace(store=store._replace(images=kept))
        yield f"{state.actors[me].name} deletes {key}", _goes(deleted, me, "put_image")

    # The sidecar

    def serve(self, state: State, me: int) -> Moves:
        """Begin to end a job that waits, if it has expired or a client asks to end it."""
        redis, client = state.redis, state.actors[-1]
        if not redis.is_known or redis.is_closed or redis.lease:
            return
        marked = _redis(state, is_ending=True) if self.rules.sidecar_marks else state
        if self.bounds.expires and redis.celery_state == PENDING:
            expired = _goes_to_end(marked, me, "write_verdict", End(EXPIRED))
            yield "the sidecar finds that the job has expired", expired
        if client.step == "wait_for_sidecar" and not redis.running:
            revoked = _goes_to_end(marked, me, "write_verdict", End(REVOKED))
            yield "the sidecar begins to end the job for the client", revoked

    # The client

    def cancel(self, state: State, me: int) -> Moves:
        """Set the flag, and look whether the job runs."""
        redis = state.redis
        flagged = _redis(state, is_cancelled=True)
        if redis.is_closed or redis.lease or redis.running or not redis.is_known:
            yield "the client cancels the job, which runs or has ended", _ends(flagged, me)
        else:
            yield "the client cancels the job, which waits", _goes(flagged, me, "wait_for_sidecar")

    def wait_for_sidecar(self, state: State, me: int) -> Moves:
        """Wait until a sidecar has ended the job, or give up."""
        if self.bounds.has_replies:
            yield "the client receives the reply of the sidecar", _ends(state, me)
        else:
            yield "the client gives up waiting for a sidecar", _goes(state, me, "end_alone")

    def end_alone(self, state: State, me: int) -> Moves:
        """Note a verdict in the record, if no attempt can have written an end into the store."""
        redis = state.redis
        has_begun = redis.has_begun if self.rules.client_looks_for_begun else bool(redis.running)
        is_decided = redis.is_closed or redis.is_ending
        if not redis.is_known or redis.lease or has_begun or is_decided:
            yield "the client leaves the end to sidecar and workers", _ends(state, me)
            return
        noted = _redis(_shows_end(state, End(REVOKED)), verdict=End(REVOKED), is_closed=True)
        noted = _goes_to_end(noted, me, "answer", End(REVOKED))
        yield "the client notes a verdict in the record by itself", noted

    # Faults

    def _faults(self, state: State) -> Moves:
        redis = state.redis
        if redis.lease:
            yield f"the lease of {redis.lease} expires", _redis(state, lease="")
        if state.deaths:
            for me, actor in enumerate(state.actors):
                if actor.name in redis.running and actor.step != GONE:
                    killed = state._replace(deaths=state.deaths - 1)
                    killed = _redis(killed, lease="") if redis.lease == actor.name else killed
                    yield (
                        f"{actor.name} is killed, and its parent notes it",
                        self._leaves(killed, me),
                    )
        for request in state.store.late:
            yield from self._arrives(state, request)
        if state.losses and state.replica is None:
            yield "the replica of Redis falls behind", state._replace(replica=redis)
            lost = state._replace(redis=Redis(is_known=False), losses=state.losses - 1)
            yield "Redis loses all that it has of the job", lost
        if state.losses and state.replica not in (None, redis):
            failed_over = state._replace(redis=state.replica, replica=None, losses=state.losses - 1)
            yield "Redis fails over to the replica, which has not the last writes", failed_over

    def _arrives(self, state: State, request: Request) -> Moves:
        """Let a late request take effect."""
        sender, key, content = request
        store = state.store._replace(late=state.store.late - {request})
        what = f"the request of {sender} for {key} arrives"
        if content is None:
            kept = frozenset(image for image in store.images if image[0] != key)
            yield f"{what}: it is deleted", state._replace(store=store._replace(images=kept))
        elif isinstance(content, End):
            if store.manifest is None:
                store = store._replace(manifest=content)
            yield f"{what}, which has {store.manifest}", state._replace(store=store)
        else:
            if store.image(key) is None:
                store = store._replace(images=store.images | {(key, content)})
            yield f"{what}, which has {store.image(key)}", state._replace(store=store)

    def _late(self, state: State, me: int, key: str, content: str | End) -> Moves:
        """Let a sender give up a request that takes effect later."""
        if not state.late:
            return
        actor = state.actors[me]
        request = Request(actor.name, key, content)
        late = state.store.late | {request}
        sent = state._replace(store=state.store._replace(late=late), late=state.late - 1)
        if actor.step != "write_verdict":
            yield from self._fails(sent, me, f"gives up {key}, which is on its way")
            return
        following = "note_error" if self.rules.waits_for_store else "record_verdict"
        given_up = _ends(sent, me) if actor.name == SIDECAR else _goes(sent, me, following)
        yield f"{actor.name} gives up the verdict, which is on its way", given_up

    def _fails(self, state: State, me: int, why: str) -> Moves:
        """Let an attempt end with an error, which is either tried again or the verdict."""
        name = state.actors[me].name
        yield f"{name} {why}, and tries again", _goes(state, me, "store_retry")
        verdict = _goes_to_end(state, me, "require_newest", End("failure", name))
        yield f"{name} {why}, and fails", verdict

    def _leaves(self, state: State, me: int) -> State:
        """Return the state in which an attempt has left the job."""
        return _ends(self._forgets(state, me), me)

    def _forgets(self, state: State, me: int) -> State:
        """Return the state in which the record has forgotten an attempt."""
        actor, redis = state.actors[me], state.redis
        is_newest = redis.token == actor.name or not self.rules.undoes_own_mark
        has_begun = redis.has_begun and not (actor.is_first and is_newest)
        return _redis(state, running=redis.running - {actor.name}, has_begun=has_begun)

    def _is_lost(self, state: State, me: int) -> bool:
        """Return whether the record says that another attempt is the newest."""
        newest = state.redis.token
        return self.rules.checks_token and newest not in ("", state.actors[me].name)

    def _may_store_state(self, state: State, me: int) -> bool:
        """Return whether the state of a job that goes on is stored."""
        redis = state.redis
        has_ended = redis.is_closed or isinstance(redis.celery_state, End)
        return not (has_ended and self.rules.checks_end) and not self._is_lost(state, me)


def two_ends(state: State) -> str:
    """Say which two ends the job has: among all that clients see, and in the manifest."""
    manifest = state.store.manifest
    if len(state.shown) > 1:
        return f"clients see two ends: {state.shown[0]}, then {state.shown[1]}"
    if state.shown and manifest is not None and state.shown[0] != manifest:
        return f"clients see {state.shown[0]}, and the manifest has {manifest}"
    return ""


def missing_images(state: State) -> str:
    """Say which result has lost an image."""
    manifest = state.store.manifest
    if manifest is not None and not manifest.images <= state.store.images:
        return f"the manifest has {manifest}, and an image of it is gone"
    return ""


def overwritten_end(state: State) -> str:
    """Say that clients see a state of a running job after its end."""
    return "an end is overwritten by a state of a running job" if state.is_overwritten else ""


PROPERTIES: Final = (two_ends, missing_images, overwritten_end)


def explore_protocol(
    bounds: Bounds,
    rules: Rules = Rules(),
    *,
    properties: Sequence[Callable[[State], str]] = PROPERTIES,
    most: int = 3_000_000,
) -> Exploration:
    """Visit all states within the bounds, at most so many, until one violates a property."""
    protocol = Protocol(rules, bounds)

    def violated(state: State) -> str:
        return next(filter(None, (broken(state) for broken in properties)), "")

    return explore(protocol.start(), protocol.moves, violated, most=most)


def _key(index: int, name: str = "") -> str:
    return f"outputs/{index}-{name[-1]}" if name else f"outputs/{index}"


def _goes(state: State, me: int, step: str, **changes: Any) -> State:
    """Return the state in which an actor has gone on to its next step."""
    actor = state.actors[me]
    return _with(state, me, actor._replace(step=step, **changes))


def _goes_to_end(state: State, me: int, step: str, end: End, *, is_decided: bool = False) -> State:
    """Return the state in which an actor begins to end the job, and needs its images no more."""
    name, is_first = state.actors[me].name, state.actors[me].is_first
    actor = Actor(name, step, is_first=is_first, end=end, is_decided=is_decided)
    return _with(state, me, actor)


def _with(state: State, me: int, actor: Actor) -> State:
    actors = state.actors
    return state._replace(actors=(*actors[:me], actor, *actors[me + 1 :]))


def _decided(state: State, me: int, manifest: End) -> State:
    """Return the state in which an actor follows the end that the manifest has."""
    if manifest.kind != RESULT:
        is_sidecar = state.actors[me].name == SIDECAR
        following = "answer" if is_sidecar else "delete_images"
        return _goes_to_end(state, me, following, manifest, is_decided=True)
    has_attempt = state.actors[me].name in state.redis.running
    following = "end_attempt" if has_attempt else "record_success"
    return _goes_to_end(state, me, following, manifest, is_decided=True)


def _has_image(state: State, me: int, image: Image) -> State:
    images = state.actors[me].images | {image}
    return _goes(state, me, "raise_if_over", images=images, is_apart=False)


def _ends(state: State, me: int) -> State:
    """Return the state in which an actor is done; what it knew makes no difference any more."""
    name = state.actors[me].name
    return _with(state, me, Actor(name, "serve" if name == SIDECAR else GONE))


def _redis(state: State, **changes: Any) -> State:
    return state._replace(redis=state.redis._replace(**changes))


def _shows_end(state: State, end: End) -> State:
    return state if end in state.shown else state._replace(shown=(*state.shown, end))


def _shows_state(state: State, word: str) -> State:
    is_end = isinstance(state.redis.celery_state, End)
    return _redis(state._replace(is_overwritten=is_end), celery_state=word)
