"""The shop's one table."""

import uuid

from django.db import models
from zlora import job_id_of


class Order(models.Model):
    """A picture that somebody has paid for. `key` is its job's idempotency key: a number might come again elsewhere."""

    class State(models.TextChoices):
        """Where the order is."""

        OPEN = "open"
        DRAWN = "drawn"
        FAILED = "failed"

    key = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    prompt = models.CharField(max_length=1000)
    state = models.CharField(
        max_length=10, choices=State.choices, default=State.OPEN, editable=False
    )
    picture = models.CharField(
        max_length=300, editable=False
    )  # where it is in the store, which lasts; a URL may end
    url = models.TextField(editable=False)
    error = models.CharField(max_length=50, editable=False)  # a code of `zlora.errors`
    job_id = models.CharField(max_length=64, unique=True, editable=False)

    def __str__(self) -> str:
        return f"{self.prompt} ({self.state})"

    def save(self, *args: object, **options: object) -> None:
        """The job's id follows from the key: the row has it before there is a job, and a webhook finds it."""
        self.job_id = job_id_of(str(self.key))
        super().save(*args, **options)
