"""`zlora serve`: the queue over HTTP, for programs in any language.

* `run`, `settings`: uvicorn and the environment; `slow_clients` ends connections that are too slow
* `app`: the ASGI application, made from all APIs, with its `middleware`; `open_requests` and
  `rate_limits` bound what it takes
* `native`: the API `/v1`; `fal`, `openai_images` and `a1111` are those of other services, with
  `a1111_fields` and `infotext` for the last one; `page` is for browsers
* `endpoint`, `openapi`: what an API is made from, and its document
* `service`: what all APIs do with jobs, and for whom; `tenants` has the API keys, `job_owners`
  whose each job is
* `events`, `problems`, `metrics`: streams, errors and figures of all APIs
"""
