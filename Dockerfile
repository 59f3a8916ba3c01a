# Images by --target: embedded (the default: no torch, no model), cpu and cuda, which start with the
# profile of that name and keep the models they download in the volume /models.
FROM python:3.11-slim-bookworm AS packages
COPY requirements-core.txt requirements-nodeps.txt /tmp/
RUN python -m venv /opt/parley \
    && /opt/parley/bin/pip install --no-cache-dir -r /tmp/requirements-core.txt \
    && /opt/parley/bin/pip install --no-cache-dir --no-deps -r /tmp/requirements-nodeps.txt

FROM packages AS packages-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt /tmp/
RUN /opt/parley/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0 \
    && /opt/parley/bin/pip install --no-cache-dir -r /tmp/requirements.txt

# The torch of the package index is the CUDA build and brings the CUDA libraries.
FROM packages AS packages-cuda
COPY requirements.txt /tmp/
RUN /opt/parley/bin/pip install --no-cache-dir -r /tmp/requirements.txt

FROM python:3.11-slim-bookworm AS server
WORKDIR /srv/parley
COPY handlers handlers
COPY models models
COPY server server
RUN useradd --uid 10001 parley && install -d -o parley /models
USER 10001
ENV PATH=/opt/parley/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models
EXPOSE 8765
# The first start may have to download models.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8765/healthz')"]
# Reachable from outside the container, so a key is needed: docker run -e PARLEY_API_KEY=… -p …
# docker stop kills after 10 s.
ENTRYPOINT ["python", "-m", "server", "--host", "0.0.0.0", "--drain_s", "8"]

FROM server AS cpu
COPY --from=packages-cpu /opt/parley /opt/parley
VOLUME /models
CMD ["--profile", "cpu"]

FROM server AS cuda
COPY --from=packages-cuda /opt/parley /opt/parley
VOLUME /models
CMD ["--profile", "cuda"]

FROM server AS embedded
COPY --from=packages /opt/parley /opt/parley
