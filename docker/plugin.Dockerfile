# vLLM on a GPU that serves every adapter in /adapters by its name:
#   docker build -f docker/plugin.Dockerfile -t loraover-plugin .
#   docker run --gpus all -p 8000:8000 -v $PWD/adapters:/adapters:ro -v loraover-cache:/cache loraover-plugin MODEL --enable-lora
FROM vllm/vllm-openai:v0.33.0

COPY . /loraover
RUN pip install --no-cache-dir "/loraover[load]"
ENV LORAOVER_ADAPTERS=/adapters LORAOVER_CACHE=/cache LORAOVER_RELOAD=1 VLLM_PLUGINS=loraover VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
