"""Descriptions of the supported families of base models, one in each file."""
