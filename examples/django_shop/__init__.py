"""A Django shop: an order is one row, one job and, by webhook, one picture, whatever is rolled back or comes twice.

`views.py` is what to read: a job is queued by `transaction.on_commit` under the order's key, and its end comes to a
view that verifies it. The shop is on sqlite, in `shop.sqlite3` or the file that the variable `SHOP_DATABASE` names.
From the folder of the clone:

    python -m django migrate --run-syncdb --settings examples.django_shop.settings
    python -m django runserver 8000 --noreload --settings examples.django_shop.settings

Beside it runs a worker that may send to this machine:

    ZLORA_ALLOW_HOSTS=127.0.0.1:8000 zlora up

Elsewhere `ZLORA_WEBHOOK_SECRET` is the same for both; `zlora up` has one by itself, and the shop finds it.
"""
