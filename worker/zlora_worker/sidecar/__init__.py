"""The helper process beside the parent: sweeper, prefetch, webhooks, metrics."""
