"""A Django shop: each order is one row, one job and, by webhook, one image.

Read `views.py`: `transaction.on_commit` queues a job under the order's key, and a view verifies the
webhook of its end. The shop uses SQLite, in `shop.sqlite3` or the file that the variable
`SHOP_DATABASE` names. From the folder of the clone:

    python -m django migrate --run-syncdb --settings examples.django_shop.settings
    python -m django runserver 8000 --noreload --settings examples.django_shop.settings

It needs a worker that is allowed to send to this machine:

    ZLORA_ALLOW_HOSTS=127.0.0.1:8000 zlora up

`zlora up` makes a secret that the shop finds on this machine. On other machines, set
`ZLORA_WEBHOOK_SECRET` to the same value for both.
"""
