# The demo on a CPU: docker build -f docker/demo-cpu.Dockerfile -t loraover-demo . && docker run --rm -v "$PWD/runs:/loraover/runs" loraover-demo
FROM python:3.12-slim-trixie

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /loraover
COPY pyproject.toml README.md LICENSE Makefile ./
COPY loraover loraover
COPY export export
COPY serve serve
COPY docs docs
RUN python -m venv .venv && .venv/bin/pip install --no-cache-dir ".[train,export,serve]" && touch .venv/.demo-installed
CMD ["make", "demo"]
