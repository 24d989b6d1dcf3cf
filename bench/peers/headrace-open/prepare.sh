# No key and no plan; the log goes to standard output, as it does by default.
export PYTHONPATH="$BENCH_REPOSITORY"
cat > headrace.yaml <<YAML
listen: 127.0.0.1:$BENCH_PORT
admin: 127.0.0.1:$BENCH_SECOND_PORT
workers: $BENCH_WORKERS
max_connections: 9000
upstreams:
  bench: {base_url: "$BENCH_UPSTREAM/v1", api_key: up, max_in_flight: 20000${BENCH_CA:+, ca_file: "$BENCH_CA"}}
models:
  mock-model: {upstreams: [bench]}
auth: {mode: open}
limits: {max_in_flight: 20000}
ledger: {database: "sqlite:$BENCH_OUT/headrace.db"}
YAML
"$BENCH_PYTHON" -m proxy --version > version
