"""The worker's commands of `zlora`: cache, doctor, metrics, replay."""
