command -v npm > /dev/null || { echo "apt-get install npm" >&2; exit 1; }
home="$BENCH_CACHE/portkey"
[ -f "$home/complete" ] && exit
rm -rf "$home"; mkdir -p "$home"; cd "$home" || exit 1
echo '{"private": true, "dependencies": {"@hono/node-server": "^1.13.8", "@portkey-ai/gateway": "^1.15.2", "hono": "^4.9.7"}}' > package.json
npm install --silent --no-audit --no-fund && touch complete
