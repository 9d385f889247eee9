# sleap-rtc in a container: worker, signaling server or client.
#
#   docker build -t sleap-rtc .
#   docker build -t sleap-rtc-worker --build-arg SLEAP_NN=sleap-nn==0.3.5 .
#
# A worker needs SLEAP_NN to train; a signaling server and a client do not. The driver of
# the GPU comes from the host (docker run --gpus all), CUDA with the packages of SLEAP_NN.

FROM python:3.12-slim AS build

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sleap_rtc sleap_rtc
RUN python -m venv /opt/sleap-rtc \
    && /opt/sleap-rtc/bin/pip install --no-cache-dir --constraint constraints.txt .

# An environment of its own, so the trainer's dependencies need not agree with ours.
ARG SLEAP_NN=""
RUN python -m venv /opt/sleap-nn \
    && if [ -n "${SLEAP_NN}" ]; then \
      /opt/sleap-nn/bin/pip install --no-cache-dir "${SLEAP_NN}"; \
    fi


FROM python:3.12-slim

# The first ordinary user of most hosts has the same number, so files on mounted storage
# belong to that user there.
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin sleap \
    && install --directory --owner sleap --group sleap --mode 0700 /var/lib/sleap-rtc \
    && install --directory --owner sleap --group sleap /mnt/shared /work

COPY --from=build /opt /opt

ENV PATH=/opt/sleap-rtc/bin:${PATH}:/opt/sleap-nn/bin \
    PYTHONUNBUFFERED=1 \
    SLEAP_RTC_STATE_DIR=/var/lib/sleap-rtc

USER 1000
WORKDIR /work
VOLUME /var/lib/sleap-rtc

# The signaling server; the port of a worker's links is set with --port, if at all.
EXPOSE 8787

HEALTHCHECK --interval=60s --timeout=20s --start-period=20s --retries=3 \
    CMD ["sleap-rtc", "doctor"]

ENTRYPOINT ["sleap-rtc"]
CMD ["daemon", "--role", "worker", "--log-format", "json"]
