# Sourced by the other scripts: enters the repository, and makes or refreshes its virtual environment, which comes first
# in PATH. FLEXTOK_VENV names another place than .venv.
flextok_env() {
  local repo venv stamp sum python candidate
  repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${FLEXTOK_VENV:-$repo/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  cd "$repo"
  stamp=$venv/.flextok-installed
  sum="$(cat requirements.txt setup.py | cksum) $repo"

  if ! { [[ -r $stamp && $(<"$stamp") == "$sum" ]] && "$venv/bin/python" -c 'import flextok_jax' 2>/dev/null; }; then
    # An environment that works and is new enough is kept; anything else that is an environment is made anew.
    if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        echo "error: $venv is no virtual environment: remove it, or set FLEXTOK_VENV to another place" >&2
        return 1
      fi
      for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
          python=$candidate
          break
        fi
      done
      if [[ -z ${python:-} ]]; then
        echo "error: Python 3.11 or newer is needed, and neither python3.11 nor python3 is one" >&2
        return 1
      fi
      echo "making a virtual environment in $venv"
      "$python" -m venv --clear "$venv"
    fi
    rm -f "$stamp"
    echo "installing packages into $venv (once, a few minutes)"
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 \
        --editable .
    else # newer than the pinned set: by the ranges of setup.py
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
    fi
    echo "$sum" >"$stamp"
  fi
  export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
}
flextok_env
