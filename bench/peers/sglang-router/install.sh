name=sglang-router
. "${0%/*}/../venv.sh"
venv "sglang-router"
