command -v haproxy > /dev/null || { echo "apt-get install haproxy" >&2; exit 1; }
cat > haproxy.cfg <<CFG
global
  nbthread $BENCH_WORKERS
  maxconn 9500
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option http-no-delay
  http-reuse always
frontend f
  bind 127.0.0.1:$BENCH_PORT backlog 4096
  default_backend b
backend b
  server m ${BENCH_UPSTREAM#*://} pool-max-conn 4096${BENCH_CA:+ ssl verify required ca-file $BENCH_CA verifyhost localhost sni str(localhost)}
CFG
haproxy -v | head -1 | cut -d ' ' -f 1-3 > version
exec haproxy -f haproxy.cfg -db
