# shellcheck shell=bash
# Sourced by the other scripts: changes to the repository, creates or updates its virtual environment (.venv, or
# FLEXTOK_VENV) and puts it first in PATH. With the argument --functions it only defines the functions.

# Where it is set, as in many container images, every process would compile all packages anew: seconds for each.
unset PYTHONDONTWRITEBYTECODE

# flextok_python VERSION: prints the path of a Python interpreter of a version such as 3.12, from PATH or pyenv.
flextok_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    # a pyenv shim may exist without working
    "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null || continue
    "$candidate" -c 'import sys; print(sys.executable)'
    return
  done
  return 1
}

# flextok_install VENV PYTHON [PACKAGE...]: creates or updates the virtual environment VENV and installs this package in
# editable mode and PACKAGE..., by default those of the test extra. Does nothing if VENV is up to date.
flextok_install() {
  local venv=$1 python=$2 stamp sum
  shift 2
  stamp=$venv/.flextok-installed
  sum="$(cat requirements.txt setup.py | cksum) $PWD${*:+ $*}"
  if [[ -r $stamp && $(<"$stamp") == "$sum" ]] && "$venv/bin/python" -c 'import jax' 2>/dev/null; then return; fi
  # Keep an environment that works and has Python 3.11 or newer; recreate any other.
  if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
      echo "error: $venv is not a virtual environment: remove it, or set FLEXTOK_VENV to another path" >&2
      return 1
    fi
    "$python" -m venv --clear "$venv" || return 1
  fi
  rm -f "$stamp"
  echo "installing packages into $venv (only once, takes a minute or two)"
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-compile)
  if (($#)); then
    "${pip[@]}" --editable . "$@" || return 1
  elif "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
    "${pip[@]}" --requirement requirements.txt || return 1
    "${pip[@]}" --no-deps --no-build-isolation --use-pep517 --editable . || return 1
  else # requirements.txt is for 3.11; newer Pythons use the version ranges of setup.py
    "${pip[@]}" --editable '.[test]' || return 1
  fi
  echo "$sum" >"$stamp"
}

# flextok_interpreter: prints the Python that a new environment is made with, or nothing if there is none.
flextok_interpreter() {
  local candidate python=""
  for candidate in python3 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate
  done
  echo "$python"
}

flextok_env() {
  local repo venv python
  repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
  venv=${FLEXTOK_VENV:-$repo/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  cd "$repo" || return 1
  python=$(flextok_interpreter)
  if [[ -z $python ]] && ! "$venv/bin/python" -c 'import jax' 2>/dev/null; then
    echo "error: Python 3.11 or newer is required; found neither as python3.11 nor as python3" >&2
    return 1
  fi
  flextok_install "$venv" "$python" || return 1
  export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
}

if [[ ${1-} != --functions ]]; then flextok_env; fi
