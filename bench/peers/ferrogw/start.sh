cat > config.yaml <<YAML
strategy: {mode: fallback}
targets: [{virtual_key: openai}]
YAML
bin="$BENCH_CACHE/ferrogw/bin"
"$bin/python" -c 'from importlib.metadata import version; print("ferrogw", version("ferrogw"))' > version
export OPENAI_API_KEY=up OPENAI_BASE_URL="$BENCH_UPSTREAM" MASTER_KEY=fgw_00000000000000000000000000000000
export GATEWAY_CONFIG=config.yaml PORT="$BENCH_PORT" LOG_LEVEL=error RATE_LIMIT_RPS=0 GOMAXPROCS=1
exec "$bin/ferrogw" serve
