name=ferrogw
. "${0%/*}/../venv.sh"
venv "ferrogw"
