# vLLM on a GPU with an adapter that passed the pre-flight, on port 8000:
#   docker build -f docker/serve-gpu.Dockerfile -t loraover-serve .
#   docker run --gpus all -p 8000:8000 -e VLLM_API_KEY=... -v $PWD/for-vllm:/adapters/for-vllm \
#     -v ~/.cache/huggingface:/root/.cache/huggingface loraover-serve
FROM vllm/vllm-openai:v0.33.0

COPY . /loraover
RUN pip install --no-cache-dir "/loraover[serve]"
ENTRYPOINT ["loraover", "serve", "up", "--host", "0.0.0.0"]
CMD ["/adapters/for-vllm"]
