# One image for both services of compose.yaml: MLflow's server, and `mnist serve`. `docker compose up --build` makes it.
ARG BASE=python:3.12-slim
FROM ${BASE}
RUN command -v make git || \
    { apt-get update && apt-get install --yes --no-install-recommends make git && rm -rf /var/lib/apt/lists/*; }

WORKDIR /mnist
COPY LICENSE Makefile README.md install.py pyproject.toml requirements*.lock ./
COPY src src
ARG TORCH=
RUN make TORCH="${TORCH}" setup && .venv/bin/uv cache clean --quiet

COPY params.yaml dvc.yaml ./
COPY models models
RUN useradd --create-home mnist && mkdir /store && chown mnist /store .
USER mnist
ENV PATH=/mnist/.venv/bin:$PATH MLFLOW_DISABLE_TELEMETRY=true
CMD ["mnist", "serve", "--host", "0.0.0.0"]
