# shellcheck shell=bash
# Sourced by the other scripts: enters the repository, makes or refreshes its virtual environment and puts it first in
# PATH. FLEXTOK_VENV names another place than .venv.
flextok_env() {
  local repo venv stamp sum candidate python=""
  repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
  venv=${FLEXTOK_VENV:-$repo/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  cd "$repo" || return 1
  stamp=$venv/.flextok-installed
  sum="$(cat requirements.txt setup.py | cksum) $repo"

  if ! { [[ -r $stamp && $(<"$stamp") == "$sum" ]] && "$venv/bin/python" -c 'import jax' 2>/dev/null; }; then
    # An environment that runs and is new enough is kept; a broken or older one is made anew.
    if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        echo "error: $venv is no virtual environment: remove it, or set FLEXTOK_VENV to another place" >&2
        return 1
      fi
      for candidate in python3 python3.11; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate
      done
      if [[ -z $python ]]; then
        echo "error: Python 3.11 or newer is needed, and neither python3.11 nor python3 is one" >&2
        return 1
      fi
      "$python" -m venv --clear "$venv" || return 1
    fi
    rm -f "$stamp"
    echo "installing packages into $venv (once, a minute or two)"
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
      "${pip[@]}" --requirement requirements.txt || return 1
      "${pip[@]}" --no-deps --no-build-isolation --use-pep517 --editable . || return 1
    else # the pins are for 3.11: newer versions by the ranges of setup.py
      "${pip[@]}" --editable '.[test]' || return 1
    fi
    echo "$sum" >"$stamp"
  fi
  export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
}
flextok_env
