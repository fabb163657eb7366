"""Metrics of the server, for Prometheus."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY: Final = CollectorRegistry()
REQUESTS: Final = Counter(
    "zlora_http_requests",
    "Requests by API, path of the endpoint, method and status.",
    ("api", "path", "method", "status"),
    registry=REGISTRY,
)
SECONDS: Final = Histogram(
    "zlora_http_request_seconds",
    "Seconds until the answer begins.",
    ("api", "path", "method"),
    registry=REGISTRY,
)
OPEN: Final = Gauge(
    "zlora_http_open_requests",
    "Requests that are being answered, streams of events included.",
    registry=REGISTRY,
)
STREAMS: Final = Gauge(
    "zlora_http_event_streams", "Streams of events that are open.", registry=REGISTRY
)
