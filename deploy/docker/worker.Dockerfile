# The GPU worker. Layers in order of change: system, dependencies, this project.
FROM python:3.12-slim
RUN useradd --create-home --uid 10001 zlora && install -d -o zlora /data /store
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
# The dependencies alone, from stub packages, so that a change of code does not fetch torch again.
RUN mkdir -p producer/zlora worker/zlora_worker && touch producer/zlora/__init__.py worker/zlora_worker/__init__.py \
    && pip install --no-cache-dir '.[worker]'
COPY producer producer
COPY worker worker
RUN pip install --no-cache-dir --no-deps --force-reinstall '.[worker]'
USER 10001
ENV ZLORA_HOME=/data HF_HOME=/data/huggingface
CMD ["celery", "-A", "zlora_worker.app", "worker", "--loglevel", "INFO"]
