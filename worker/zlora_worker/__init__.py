"""The worker: a Celery app whose one child keeps the base model and runs the jobs."""
