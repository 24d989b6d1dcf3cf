name=vllm-router
. "${0%/*}/../venv.sh"
venv "vllm-router"
