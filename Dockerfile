# An image that has the project's commands. compose.yaml runs MLflow's server and the digit page in it.
ARG BASE=python:3.12-slim
FROM $BASE
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /mnist
COPY . .
# The services need no GPU. `--build-arg TORCH=` brings CUDA along.
ARG TORCH="torch torchvision --torch-backend=cpu"
# The user of the image cannot write beside the packages, so their bytecode is compiled here.
RUN UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 make setup \
	&& useradd --create-home mnist && install --directory --owner mnist /data
ENV PATH=/mnist/.venv/bin:$PATH MLFLOW_DISABLE_TELEMETRY=true
USER mnist
CMD ["mnist", "serve", "--host", "0.0.0.0"]
