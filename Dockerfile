# flextok_jax with its example server, in the tested set of versions.
#
#   docker build -t flextok .                                        for CPUs
#   docker build -t flextok-cuda --build-arg EXTRA=cuda .            for NVIDIA GPUs; run it with --gpus=all
#   docker run --rm -p 127.0.0.1:8000:8000 flextok                   the server, with the models that ship
#   docker run --rm -v "$PWD:/data" --user "$(id -u)" flextok -m flextok_jax.tokenize \
#     --checkpoint=shapes --images=/data --out=/data/tokens.json     any command
FROM python:3.11-slim

ARG EXTRA=""
ENV PYTHONUNBUFFERED=1 HOME=/tmp/home JAX_COMPILATION_CACHE_DIR=/tmp/home/compiled
WORKDIR /app

COPY README.md pyproject.toml requirements.txt setup.py src/
COPY configs src/configs
COPY flextok_jax src/flextok_jax
RUN pip install --no-cache-dir --constraint=src/requirements.txt "./src[export,serve${EXTRA:+,$EXTRA}]" && rm -r src
COPY examples/serve.py examples/

USER 1000
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=3m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["python"]
CMD ["examples/serve.py", "--host=0.0.0.0"]
