"""The table of the shop."""

import uuid

from django.db import models
from zlora import job_id_of


class Order(models.Model):
    """An image that a customer has paid for.

    `key` is the idempotency key of the job: a number could be the same in another database.
    """

    class State(models.TextChoices):
        """State of the order."""

        OPEN = "open"
        DRAWN = "drawn"
        FAILED = "failed"

    key = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    prompt = models.CharField(max_length=1000)
    state = models.CharField(
        max_length=10, choices=State.choices, default=State.OPEN, editable=False
    )
    image = models.CharField(max_length=300, editable=False)  # object key; a URL may expire
    url = models.TextField(editable=False)
    error = models.CharField(max_length=50, editable=False)  # a code of `zlora.errors`
    job_id = models.CharField(max_length=64, unique=True, editable=False)

    def __str__(self) -> str:
        return f"{self.prompt} ({self.state})"

    def save(self, *args: object, **options: object) -> None:
        """Add the id of the job, which follows from the key: a webhook finds the row by the id."""
        self.job_id = job_id_of(str(self.key))
        super().save(*args, **options)
