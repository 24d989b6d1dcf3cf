# Everything on: a key, a plan with limits, metrics, JSON log to a file, tap, ledger, heartbeat and timers.
export PYTHONPATH="$BENCH_REPOSITORY"
cat > headrace.yaml <<YAML
listen: 127.0.0.1:$BENCH_PORT
admin: 127.0.0.1:$BENCH_SECOND_PORT
workers: $BENCH_WORKERS
max_connections: 9000
upstreams:
  bench: {base_url: "$BENCH_UPSTREAM/v1", api_key: up, max_in_flight: 20000${BENCH_CA:+, ca_file: "$BENCH_CA"}}
models:
  mock-model: {upstreams: [bench], price: {input: 2.0, output: 8.0}}
plans:
  enterprise: {requests_per_minute: 100000000, burst: 1000000, tokens_per_minute: 1000000000, max_in_flight: 20000}
auth: {mode: required, database: "sqlite:$BENCH_OUT/headrace.db"}
limits: {max_in_flight: 20000, per_ip: {requests_per_minute: 100000000, burst: 1000000}}
log: {format: json, level: info, file: "$BENCH_OUT/requests.log"}
ledger: {database: "sqlite:$BENCH_OUT/headrace.db"}
YAML
"$BENCH_PYTHON" -m proxy keys create --name bench --plan enterprise -c headrace.yaml | tail -1 > key
"$BENCH_PYTHON" -m proxy --version > version
