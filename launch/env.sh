# shellcheck shell=bash
# Sourced by the other scripts: enters the repository, creates or refreshes its virtual environment and puts it first in
# PATH. FLEXTOK_VENV names another place than .venv.

# flextok_python VERSION: prints the path of a Python interpreter of that version (3.12), from PATH or pyenv.
flextok_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    # a shim of pyenv may exist without working
    "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null || continue
    "$candidate" -c 'import sys; print(sys.executable)'
    return
  done
  return 1
}

# flextok_install VENV PYTHON [PACKAGE...]: creates or refreshes the virtual environment VENV with this package, editable,
# and with more packages; without any, with those of the test extra. What is up to date is left alone.
flextok_install() {
  local venv=$1 python=$2 stamp sum
  shift 2
  stamp=$venv/.flextok-installed
  sum="$(cat requirements.txt setup.py | cksum) $PWD${*:+ $*}"
  if [[ -r $stamp && $(<"$stamp") == "$sum" ]] && "$venv/bin/python" -c 'import jax' 2>/dev/null; then return; fi
  # An environment that runs and is new enough is kept; a broken or older one is created anew.
  if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
      echo "error: $venv is not a virtual environment: remove it, or set FLEXTOK_VENV to another place" >&2
      return 1
    fi
    "$python" -m venv --clear "$venv" || return 1
  fi
  rm -f "$stamp"
  echo "installing packages into $venv (once, a minute or two)"
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
  if (($#)); then
    "${pip[@]}" --editable . "$@" || return 1
  elif "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
    "${pip[@]}" --requirement requirements.txt || return 1
    "${pip[@]}" --no-deps --no-build-isolation --use-pep517 --editable . || return 1
  else # the pins are for 3.11: newer versions by the ranges of setup.py
    "${pip[@]}" --editable '.[test]' || return 1
  fi
  echo "$sum" >"$stamp"
}

flextok_env() {
  local repo venv candidate python=""
  repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
  venv=${FLEXTOK_VENV:-$repo/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  cd "$repo" || return 1
  for candidate in python3 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate
  done
  if [[ -z $python ]] && ! "$venv/bin/python" -c 'import jax' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed, and neither python3.11 nor python3 is one" >&2
    return 1
  fi
  flextok_install "$venv" "$python" || return 1
  export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
}
flextok_env
