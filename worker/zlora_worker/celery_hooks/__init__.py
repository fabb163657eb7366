"""Code that Celery calls in the parent process: boot steps, consumer, request, transport."""
