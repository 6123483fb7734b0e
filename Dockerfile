# The image holds one command, voicetx, and runs it as a user that may only write to /data.
# Both stages need the same BASE, because the virtual environment of the first one is copied to the second unchanged.
# BASE needs no more than Debian's tools and python3 (3.11 or later) with venv.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
WORKDIR /build
COPY requirements-build.lock requirements.lock ./
# Only what a lock file names with its hash is installed, and no source distribution, because that could fetch more.
RUN python3 -m venv tools \
    && tools/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements-build.lock
RUN python3 -m venv --without-pip /opt/voicetx \
    && tools/bin/pip --python /opt/voicetx/bin/python install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements.lock
COPY pyproject.toml README.md ./
COPY alembic alembic
COPY src src
RUN tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && tools/bin/pip --python /opt/voicetx/bin/python install --no-index --no-deps dist/*.whl

FROM ${BASE}
# The user's number is fixed, so that volumes keep their owner.
# USER names it by number, so that Kubernetes can see that it is not root.
RUN groupadd --gid 10001 voicetx \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin voicetx \
    && install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=build /opt/voicetx /opt/voicetx
ENV PATH=/opt/voicetx/bin:/usr/local/bin:/usr/bin:/bin \
    VOICETX_DATABASE_URL=sqlite:////data/voicetx.db \
    VOICETX_HOST=0.0.0.0 \
    VOICETX_PORT=8000
USER 10001:10001
# `voicetx demo` stores its files below the working directory, which is on the volume.
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['VOICETX_PORT']}/healthz\", timeout=4)"]
# In exec form, the program is process 1 of the container, so SIGTERM reaches it and it can answer every request first.
ENTRYPOINT ["voicetx"]
CMD ["serve"]
