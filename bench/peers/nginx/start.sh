# Unbuffered, one worker, connections to the upstream kept: the least that a streaming proxy can do.
command -v nginx > /dev/null || { echo "apt-get install nginx" >&2; exit 1; }
tls=
[ -z "$BENCH_CA" ] || tls="proxy_ssl_trusted_certificate $BENCH_CA; proxy_ssl_verify on; proxy_ssl_name localhost; proxy_ssl_server_name on; proxy_ssl_session_reuse on;"
cat > nginx.conf <<CONF
worker_processes $BENCH_WORKERS;
daemon off;
pid $BENCH_OUT/nginx.pid;
error_log $BENCH_OUT/nginx-error.log warn;
worker_rlimit_nofile 20000;
events { worker_connections 9000; use epoll; }
http {
  access_log off; tcp_nodelay on; keepalive_requests 1000000; keepalive_timeout 300s;
  client_body_temp_path $BENCH_OUT/body; proxy_temp_path $BENCH_OUT/proxied;
  upstream bench { server ${BENCH_UPSTREAM#*://}; keepalive 4096; keepalive_requests 1000000; }
  server {
    listen 127.0.0.1:$BENCH_PORT backlog=4096;
    client_max_body_size 32m; client_body_buffer_size 256k;
    location / {
      proxy_pass ${BENCH_UPSTREAM%%:*}://bench; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300s; $tls
    }
  }
}
CONF
nginx -v 2>&1 | sed 's/.*: //' > version
exec nginx -c "$BENCH_OUT/nginx.conf" -e "$BENCH_OUT/nginx-error.log"
