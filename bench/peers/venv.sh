# Read by install.sh: `venv REQUIREMENT` makes the virtual environment $home, once.
home="$BENCH_CACHE/$name"
venv() {
  [ -f "$home/complete" ] && return
  rm -rf "$home"
  "$BENCH_PYTHON" -m venv "$home" && "$home/bin/pip" install -q --disable-pip-version-check "$1" && touch "$home/complete"
}
