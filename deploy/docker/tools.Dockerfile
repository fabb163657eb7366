# syntax=docker/dockerfile:1
# Producer, HTTP server, Flower and queue metrics, without torch. The root may be read-only; /pictures,
# /keys and /tmp are written.
#
#   docker build -f deploy/docker/tools.Dockerfile -t z-image-lora/tools:0.1.0 .
#
# Size: 0.24 GB. Measured where the tests run: the 52 packages of '.[flower,preflight,server]' have 109 MB.
# Estimated: the base image has 0.13 GB.
# By digest: --build-arg PYTHON=python:3.11.15-slim-trixie@sha256:..., see docs/operations.md.
ARG PYTHON=python:3.11.15-slim-trixie
FROM ${PYTHON} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app

FROM base AS wheel
COPY deploy/docker/build.lock /build.lock
RUN pip install --require-hashes --no-deps --requirement /build.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
COPY worker worker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base AS tools
RUN useradd --no-create-home --uid 10001 zlora && install -d -o zlora -g zlora /pictures /keys
COPY deploy/docker/tools.lock /tools.lock
RUN pip install --require-hashes --no-deps --requirement /tools.lock
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl && pip check
COPY deploy/flower/flowerconfig.py deploy/flower/flowerconfig.py
ENV HOME=/tmp
USER 10001
CMD ["zlora", "--help"]
