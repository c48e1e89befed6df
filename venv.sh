#!/bin/sh
# venv.sh FOLDER ARGUMENTS...   makes FOLDER a virtual environment with `pip install ARGUMENTS`, unless it is one
# venv.sh --find                prints the Python interpreter that it would use
set -eu

# Probed by running it: a pyenv shim can exist without its Python, and Debian's python3 lacks ensurepip.
works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 </dev/null
}

find_python() {
    for python in python3 python3.13 python3.12 python3.14 \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[2-9]*/bin/python3 \
        "$(uv python find --system '>=3.12' 2>/dev/null || true)"; do
        if works "$python"; then
            command -v "$python"
            return
        fi
    done
    echo "error: Python 3.12 or newer with venv is needed and was not found; install it from python.org," \
        "with 'apt install python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12'." >&2
    return 1
}

if [ "${1:-}" = --find ]; then
    find_python
    exit
fi

folder=$1
shift
stamp=$folder/installed
wanted="$PWD: $*"
known=
if [ -f "$stamp" ] && [ -z "$(find setup.py -newer "$stamp")" ]; then
    known=$(cat "$stamp")
    if grep -qxF -e "$wanted" "$stamp" && [ -x "$folder/bin/python" ]; then
        exit
    fi
fi

# Without its stamp, written last, an environment may be half made and is made anew.
if [ ! -f "$stamp" ] || ! works "$folder/bin/python"; then
    python=$(find_python)
    echo "Making $folder with $("$python" --version); the first installation takes about two minutes."
    "$python" -m venv --clear "$folder"
else
    echo "Updating $folder; this takes up to two minutes."
fi
rm -f "$stamp"
"$folder/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@"
printf '%s\n' "$wanted" ${known:+"$known"} >"$stamp"
