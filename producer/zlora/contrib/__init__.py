"""Conversions from and to the request formats of other services."""
