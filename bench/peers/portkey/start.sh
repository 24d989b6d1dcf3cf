home="$BENCH_CACHE/portkey"
# Without this the gateway answers every stream with 500 (1.15.2 on Node 20).
cat > shim.mjs <<'JS'
const { fetch: original, Response: Plain } = globalThis;
globalThis.fetch = async (...args) => {
  const { body, status, statusText, headers } = await original(...args);
  return new Plain(body, { status, statusText, headers: new Headers(headers) });
};
JS
node -p '"Portkey " + require(process.argv[1]).version' "$home/node_modules/@portkey-ai/gateway/package.json" > version
shim="$PWD/shim.mjs"
cd "$home" || exit 1
exec node --import "$shim" node_modules/@portkey-ai/gateway/build/start-server.js --port="$BENCH_PORT" --headless
