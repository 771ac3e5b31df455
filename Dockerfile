# The project with its environment, for the CPU:
#
#   docker build -t iou_balanced_d2 .
#   docker run --rm -v "$PWD/output:/iou_balanced_d2/output" iou_balanced_d2 make demo
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /iou_balanced_d2
COPY . .
RUN python tools/setup_env.py .venv constraints.txt --use-this-python
ENV PATH="/iou_balanced_d2/.venv/bin:$PATH"
CMD ["make", "help"]
