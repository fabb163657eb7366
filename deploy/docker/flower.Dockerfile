# Flower and producers: no torch.
FROM python:3.12-slim
RUN useradd --create-home --uid 10001 zlora
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
COPY worker worker
RUN pip install --no-cache-dir '.[flower]'
USER 10001
CMD ["celery", "-A", "zlora_worker.app", "flower", "--address=0.0.0.0", "--port=5555"]
