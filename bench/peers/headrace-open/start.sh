# No key and no plan; the log goes to standard output, as it does by default.
export PYTHONPATH="$BENCH_REPOSITORY"
port_of() { "$BENCH_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
cat > headrace.yaml <<YAML
listen: 127.0.0.1:$BENCH_PORT
admin: 127.0.0.1:$(port_of)
workers: $BENCH_WORKERS
max_connections: 9000
upstreams:
  bench: {base_url: "$BENCH_UPSTREAM/v1", api_key: up, max_in_flight: 20000${BENCH_CA:+, ca_file: "$BENCH_CA"}}
models:
  mock-model: {upstreams: [bench]}
auth: {mode: open}
limits: {max_in_flight: 20000}
YAML
"$BENCH_PYTHON" -m proxy --version > version
exec "$BENCH_PYTHON" -m proxy serve -c headrace.yaml
