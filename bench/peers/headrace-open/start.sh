export PYTHONPATH="$BENCH_REPOSITORY"
exec "$BENCH_PYTHON" -m proxy serve -c headrace.yaml
