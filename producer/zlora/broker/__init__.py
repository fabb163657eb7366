"""Jobs on Redis: messages, records, results, and webhooks that are due."""
