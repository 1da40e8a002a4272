#!/usr/bin/env bash
# Makes what the benchmarks need outside the checkout; run again, it does only what is missing or older than its source.
# Wants gcc, python3 (3.11 or newer) with venv, and node (18.5 or newer) with npm.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
there=${ASTERA_LITE_BENCHMARKS:-${XDG_CACHE_HOME:-$HOME/.cache}/astera-lite-benchmarks}
for need in gcc node npm; do
    command -v "$need" >/dev/null || { echo "setup.sh wants $need" >&2; exit 1; }
done
mkdir -p "$there/nodered"

# The peers that the table compares, each with the extras that its own documentation recommends for speed.
packages=(fastapi==0.165.0 starlette==1.10.0 pydantic==2.14.3 uvicorn==0.54.0 uvloop==0.23.0 httptools==0.9.0
    aiosqlite==0.22.1 flask==3.1.3 gunicorn==27.0.1 huey==3.5.4
    "psycopg[binary,pool]==3.3.9" procrastinate==3.10.0 dbos==3.4.0)
nodered=node-red@4.1.15

stamp() { # stamp FILE WORDS...: true if FILE does not hold just these words
    local file=$1
    shift
    [ "$(cat "$file" 2>/dev/null || true)" != "$*" ]
}

python=$(command -v "${PYTHON:-python3}")
version=$("$python" -c 'import sys; print(sys.version)')
if stamp "$there/python.done" "$version" "${packages[@]}"; then
    rm -rf "$there/python"
    "$python" -m venv "$there/python"
    "$there/python/bin/python" -m pip install -q --disable-pip-version-check "${packages[@]}"
    echo "$version" "${packages[@]}" >"$there/python.done"
fi

if stamp "$there/nodered.done" "$nodered"; then
    (cd "$there/nodered" && npm install --silent --no-audit --no-fund --prefix . "$nodered")
    echo "$nodered" >"$there/nodered.done"
fi

for name in load slowsync.so; do
    source=$here/${name%.so}.c
    if [ "$source" -nt "$there/$name" ]; then
        shared=()
        [ "$name" = "${name%.so}" ] || shared=(-shared -fPIC)
        gcc -O2 -Wall -Wextra -Werror "${shared[@]}" -o "$there/$name" "$source"
    fi
done
echo "ready in $there"
