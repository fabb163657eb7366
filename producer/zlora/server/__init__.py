"""`zlora serve`: the queue over HTTP, for programs in any language.

* `app`: the ASGI application, made from all APIs
* `native`: the API `/v1`; `fal`, `openai_images` and `a1111` are those of other services
* `service`: what all of them do with jobs, and for whom
"""
