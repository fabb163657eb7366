"""An order's way: into the table, onto the queue once it is there to stay, and back by webhook."""

from functools import cache, partial

from django.core.mail import send_mail
from django.db import transaction
from django.forms import modelform_factory
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import reverse
from django.views.decorators.csrf import csrf_exempt, ensure_csrf_cookie
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from zlora import Client
from zlora.errors import InvalidWebhook
from zlora.webhook import Verifier

from examples.django_shop.models import Order

OrderForm = modelform_factory(Order, fields=["prompt"])


@cache
def client() -> Client:
    """One client a process, made at the first order: by then a server has forked."""
    return Client.from_env()


@cache
def verifier() -> Verifier:
    """What knows the workers' webhooks."""
    return Verifier.from_env()


class CardRefused(Exception):
    """The customer's card is not good."""


@ensure_csrf_cookie
@require_http_methods(["GET", "POST"])
def orders(request: HttpRequest) -> HttpResponse:
    """All orders, or a new one: 202 and where it is; 402, and nothing is written or drawn, where it is not paid."""
    if request.method == "GET":
        return JsonResponse({"orders": list(Order.objects.values())})
    form = OrderForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors}, status=422)
    try:
        with transaction.atomic():
            made = form.save()
            # Robust: where Redis is away the order stays open, and `submit` may be called for it again.
            transaction.on_commit(
                partial(submit, made, request.build_absolute_uri(reverse("webhook"))), robust=True
            )
            charge(request.POST.get("card", ""))
    except CardRefused:
        return JsonResponse({"error": "the card is refused"}, status=402)
    return JsonResponse(
        {"key": made.key}, status=202, headers={"Location": reverse("order", args=[made.key])}
    )


def submit(order: Order, webhook_url: str) -> None:
    """Queue an order's picture. For all open orders this may be done again at any time: one key, one job."""
    client().submit(
        {"prompt": order.prompt}, idempotency_key=str(order.key), webhook_url=webhook_url
    )


def charge(card: str) -> None:
    """Stands for what may fail when the order is written already."""
    if card != "good":
        raise CardRefused


@require_GET
def order(_request: HttpRequest, key: str) -> HttpResponse:
    """One order."""
    return JsonResponse(get_object_or_404(Order.objects.values(), key=key))


@csrf_exempt  # a worker has a signature instead
@require_POST
def webhook(request: HttpRequest) -> HttpResponse:
    """The end of a job. An order is open once, so that an event that comes again changes and mails nothing."""
    try:
        event = verifier().verify(request.body, request.headers)
    except InvalidWebhook as error:
        return JsonResponse({"error": str(error)}, status=400)
    if event.result is not None:
        image = event.result.images[0]
        change = {"state": Order.State.DRAWN, "picture": image.key, "url": image.url or ""}
    else:
        change = {
            "state": Order.State.FAILED,
            "error": event.error.code if event.error else event.type,
        }
    with (
        transaction.atomic()
    ):  # where the mail fails the order stays open, and the worker comes again
        if Order.objects.filter(job_id=event.job_id, state=Order.State.OPEN).update(**change):
            send_mail(
                "Your picture", f"{event.job_id}: {event.type}", None, ["customer@example.com"]
            )
    return HttpResponse(status=204)
