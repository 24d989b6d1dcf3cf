bin="$BENCH_CACHE/sglang-router/bin"
"$bin/python" -c 'from importlib.metadata import version; print("sglang-router", version("sglang-router"))' > version
export TOKIO_WORKER_THREADS=1
exec "$bin/smg" launch --host 127.0.0.1 --port "$BENCH_PORT" --worker-urls "$BENCH_UPSTREAM" --policy round_robin \
  --prometheus-port "$BENCH_SECOND_PORT" --log-level error --disable-retries --disable-circuit-breaker \
  --max-concurrent-requests 16384 --queue-size 16384 --rate-limit-tokens-per-second 1000000 --request-timeout-secs 600
