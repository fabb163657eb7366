# syntax=docker/dockerfile:1
# Producer, Flower and queue metrics, without torch. The root may be read-only; /pictures and /tmp are
# written.
#
#   docker build -f deploy/docker/tools.Dockerfile -t z-image-lora/tools:0.1.0 .
#
# Size: 0.22 GB. Measured where the tests run: the 45 packages of '.[flower,preflight]' have 82 MB.
# Estimated: the base image has 0.13 GB.
FROM python:3.11.15-slim-trixie AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app

FROM base AS requirements
COPY pyproject.toml ./
COPY deploy/docker/requirements.py ./
RUN python requirements.py pyproject.toml flower preflight > /requirements.txt

FROM base AS wheel
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
COPY worker worker
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS tools
RUN useradd --no-create-home --uid 10001 zlora && install -d -o zlora -g zlora /pictures
COPY deploy/docker/constraints.txt /constraints.txt
COPY --from=requirements /requirements.txt /requirements.txt
RUN pip install --constraint /constraints.txt --requirement /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
COPY deploy/flower/flowerconfig.py deploy/flower/flowerconfig.py
ENV HOME=/tmp
USER 10001
CMD ["zlora", "--help"]
