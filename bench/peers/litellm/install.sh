name=litellm
. "${0%/*}/../venv.sh"
venv "litellm[proxy]"
