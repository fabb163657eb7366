"""Options that producer and worker share, and apps that ignore Celery's own variables."""

import pytest
from zlora.broker import celery_app
from zlora.broker.celery_app import (
    IMPATIENCE,
    IsolatedCelery,
    impatient_config,
    shared_config,
    transport_options,
)
from zlora.broker.keys import PRIORITY_STEPS

OURS = "redis://ours.example:6379/1"
SOCKET_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> IsolatedCelery:
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(f"CELERY_{name}", "redis://theirs.example:6379/5")
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "no_such_module")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "no_such_settings")
    return IsolatedCelery("test", shared_config(broker_url=OURS, result_backend=OURS, queue="gpu"))


def test_an_app_connects_to_its_own_broker(app: IsolatedCelery) -> None:
    """A worker uses the first kind of connection, a client the second, and Flower the third."""
    for connect in (app.connection_for_read, app.connection_for_write, app.connection):
        with connect() as connection:
            assert connection.as_uri(include_password=True) == OURS
        with connect("redis://named.example:6379/0") as connection:
            assert connection.as_uri(include_password=True) == "redis://named.example:6379/0"


def test_an_app_writes_results_to_its_own_backend(app: IsolatedCelery) -> None:
    assert app.backend.as_uri() == OURS
    assert app.conf.task_default_queue == "gpu"


def test_each_call_returns_new_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery changes the options of an app: no two apps may share a dictionary, or a list in it."""
    monkeypatch.setattr(celery_app, "PRIORITY_STEPS", list(range(10)))
    options = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")
    options["broker_transport_options"]["priority_steps"].clear()

    again = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    assert again["broker_transport_options"]["priority_steps"] == list(range(10))
    assert again["broker_url"] == "redis://a"
    assert again["result_backend"] == "redis://b"
    assert again["task_default_queue"] == "q"


def test_only_json_is_sent_and_accepted() -> None:
    """A pickle would run code."""
    options = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    assert options["accept_content"] == ["json"]
    assert options["task_serializer"] == options["result_serializer"] == "json"


def test_each_wait_for_redis_has_a_timeout() -> None:
    options = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    for name in SOCKET_TIMEOUTS:
        assert options[f"redis_{name}"] > 0
        assert options["broker_transport_options"][name] > 0


def test_impatient_options_try_once_with_a_short_timeout() -> None:
    options = impatient_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    for name in SOCKET_TIMEOUTS:
        assert options[f"redis_{name}"] == IMPATIENCE
        assert options["broker_transport_options"][name] == IMPATIENCE
    assert not options["redis_retry_on_timeout"]
    assert options["result_backend_transport_options"] == {"retry_policy": {"max_retries": 0}}
    assert options["broker_transport_options"]["priority_steps"] == PRIORITY_STEPS


@pytest.mark.parametrize("visibility", [1, 5, 30, 3600])
def test_lost_jobs_are_looked_for_several_times_within_the_visibility(visibility: int) -> None:
    options = transport_options(visibility=visibility)

    assert options["visibility_timeout"] == visibility
    assert 1 <= options["unacked_restore_interval"] <= max(1, visibility / 6)
