"""URLs of the shop."""

from django.urls import path

from examples.django_shop import views

urlpatterns = [
    path("orders", views.orders),
    path("orders/<uuid:key>", views.order, name="order"),
    path("webhook", views.webhook, name="webhook"),
]
