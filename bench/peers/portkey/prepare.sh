# The upstream is named by every request.
echo "$BENCH_UPSTREAM/v1" > key
