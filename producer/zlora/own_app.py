"""A Celery app with the settings that it is given, whatever else in the process or its environment is Celery's too.

Celery itself prefers `CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and the module of `CELERY_CONFIG_MODULE`, which are
those of the program that uses this package.
"""

from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.loaders.app import AppLoader


class _Loader(AppLoader):
    def read_configuration(self, *_: object) -> dict[str, Any]:
        return {}


class OwnApp(Celery):
    """An app of its own broker and result backend; raises what Celery does where it cannot open the latter."""

    def __init__(
        self, name: str, config: Mapping[str, Any], *, set_as_current: bool = False
    ) -> None:
        """`config` has `broker_url` and `result_backend`."""
        # Without fixups: Django's is for the app of the project.
        super().__init__(name, loader=_Loader, fixups=[], set_as_current=set_as_current)
        self.own_broker: str = config["broker_url"]
        self.backend_cls: str = config["result_backend"]  # a URL is one too
        self.conf.update(config)

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_read(url or self.own_broker, **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self.own_broker, **options)

    def connection(self, hostname: str | None = None, *arguments: Any, **options: Any) -> Any:
        return super().connection(hostname or self.own_broker, *arguments, **options)
