"""The base model: loaded once, lent to one job at a time, checked after each job."""
