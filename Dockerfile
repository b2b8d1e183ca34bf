# align in a container, on CPUs:   docker build -t align .
# With the CUDA wheels of torch:   docker build -t align --build-arg TORCH=cu130 .
FROM python:3.11-slim

# cpu, or a CUDA version that https://download.pytorch.org/whl has wheels of torch for
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/align
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY pyproject.toml README.md LICENSE ./
COPY align ./align
COPY data_prep ./data_prep
COPY recipes ./recipes
COPY reward ./reward
RUN pip install --constraint constraints.txt '.[chat,gguf]'

# Any user may work here: the folder that is mounted holds data, runs, and what is cached.
RUN mkdir -m 1777 /work
WORKDIR /work
ENV HOME=/work USER=align
USER 1000:1000
ENTRYPOINT ["align"]
CMD ["--help"]
