# An image with the pinned versions:
#   docker build -t tokenseek .
#   docker run --gpus all -v "$PWD:/work" tokenseek train --model Qwen/Qwen2.5-0.5B --data my.jsonl
# torch's wheel brings the CUDA libraries; the host needs the driver and NVIDIA's container toolkit. Without --gpus it
# trains on the CPU.
FROM python:3.11-slim

# torch.compile and DeepSpeed build kernels when they are first used.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tokenseek
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY tokenseek tokenseek
COPY launch launch
COPY accelerate_configs accelerate_configs
COPY ds_configs ds_configs
# torch first and pinned: whatever else is installed then finds it there.
RUN pip install --no-cache-dir -c constraints.txt torch
RUN pip install --no-cache-dir -c constraints.txt -e '.[bitsandbytes]'

WORKDIR /work
ENV HF_HOME=/work/.cache/huggingface
ENTRYPOINT ["tokenseek"]
CMD ["--help"]
