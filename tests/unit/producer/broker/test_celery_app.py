"""An app has the broker and the result backend that it is given, whatever Celery's own variables say."""

import pytest
from zlora.broker.celery_app import IsolatedCelery, shared_config

OURS = "redis://ours.example:6379/1"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> IsolatedCelery:
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(f"CELERY_{name}", "redis://theirs.example:6379/5")
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "no_such_module")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "no_such_settings")
    return IsolatedCelery("test", shared_config(broker_url=OURS, result_backend=OURS, queue="gpu"))


def test_every_way_to_a_connection_leads_to_its_own_broker(app: IsolatedCelery) -> None:
    """A worker takes one, a client another, and Flower the third."""
    for connect in (app.connection_for_read, app.connection_for_write, app.connection):
        with connect() as connection:
            assert connection.as_uri(include_password=True) == OURS
        with connect("redis://named.example:6379/0") as connection:
            assert connection.as_uri(include_password=True) == "redis://named.example:6379/0"


def test_results_go_to_its_own_backend(app: IsolatedCelery) -> None:
    assert app.backend.as_uri() == OURS
    assert app.conf.task_default_queue == "gpu"
