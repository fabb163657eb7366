"""One delivery of a job: its lease, its progress, and what happens when it fails."""
