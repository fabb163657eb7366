"""Orders: a row in the table, then a job after the commit, then an image by webhook."""

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
    """Return the client of this process, made at the first order, after the server has forked."""
    return Client.from_env()


@cache
def verifier() -> Verifier:
    """Return the verifier of webhooks of this process."""
    return Verifier.from_env()


class CardRefused(Exception):
    """The customer's card was refused."""


@ensure_csrf_cookie
@require_http_methods(["GET", "POST"])
def orders(request: HttpRequest) -> HttpResponse:
    """Return all orders, or make one: 202 and its Location, or 402 if the card is refused."""
    if request.method == "GET":
        return JsonResponse({"orders": list(Order.objects.values())})
    form = OrderForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors}, status=422)
    try:
        with transaction.atomic():
            made = form.save()
            # Robust: without Redis the order stays open, and `submit` may be called again.
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
    """Queue the job of an order; repeat it for open orders at any time: one key is one job."""
    client().submit(
        {"prompt": order.prompt}, idempotency_key=str(order.key), webhook_url=webhook_url
    )


def charge(card: str) -> None:
    """Charge a card: a step that may fail after the order was written."""
    if card != "good":
        raise CardRefused


@require_GET
def order(_request: HttpRequest, key: str) -> HttpResponse:
    """Return one order."""
    return JsonResponse(get_object_or_404(Order.objects.values(), key=key))


@csrf_exempt  # webhooks have a signature instead
@require_POST
def webhook(request: HttpRequest) -> HttpResponse:
    """Record the end of a job; a repeated event finds the order closed, and changes nothing."""
    try:
        event = verifier().verify(request.body, request.headers)
    except InvalidWebhook as error:
        return JsonResponse({"error": str(error)}, status=400)
    if event.result is not None:
        image = event.result.images[0]
        change = {"state": Order.State.DRAWN, "image": image.key, "url": image.url or ""}
    else:
        change = {
            "state": Order.State.FAILED,
            "error": event.error.code if event.error else event.type,
        }
    # If the mail fails, the order stays open, and the worker sends the webhook again.
    with transaction.atomic():
        if Order.objects.filter(job_id=event.job_id, state=Order.State.OPEN).update(**change):
            send_mail("Your image", f"{event.job_id}: {event.type}", None, ["customer@example.com"])
    return HttpResponse(status=204)
