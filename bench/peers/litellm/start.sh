cat > config.yaml <<YAML
model_list:
  - model_name: mock-model
    litellm_params: {model: openai/mock-model, api_base: "$BENCH_UPSTREAM/v1", api_key: up}
litellm_settings: {telemetry: false, drop_params: true, request_timeout: 600, set_verbose: false}
general_settings: {master_key: sk-bench}
YAML
bin="$BENCH_CACHE/litellm/bin"
"$bin/python" -c 'from importlib.metadata import version; print("LiteLLM", version("litellm"))' > version
export PATH="$bin:$PATH" LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_LOG=ERROR LITELLM_MODE=PRODUCTION
exec litellm --config config.yaml --host 127.0.0.1 --port "$BENCH_PORT" --num_workers 1 --telemetry False
