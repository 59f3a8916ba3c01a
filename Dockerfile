# The server with the embedded cascade: no torch, no download of weights.
FROM python:3.11-slim-bookworm AS build
COPY requirements-core.txt requirements-nodeps.txt /tmp/
RUN python -m venv /opt/parley \
    && /opt/parley/bin/pip install --no-cache-dir -r /tmp/requirements-core.txt \
    && /opt/parley/bin/pip install --no-cache-dir --no-deps -r /tmp/requirements-nodeps.txt

FROM python:3.11-slim-bookworm
COPY --from=build /opt/parley /opt/parley
WORKDIR /srv/parley
COPY handlers handlers
COPY models models
COPY server server
RUN useradd --system --uid 10001 parley
USER 10001
ENV PATH=/opt/parley/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8765
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8765/healthz')"]
# Reachable from outside the container, so a key is needed: docker run -e PARLEY_API_KEY=… -p …
ENTRYPOINT ["python", "-m", "server", "--host", "0.0.0.0"]
