# Sourced by the scripts: goes to the root, answers --help (the script's own first lines), finds Python.
# shellcheck shell=bash
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
for argument in "$@"; do
    if [[ "$argument" == "-h" || "$argument" == "--help" ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$root/scripts/$(basename "$0")"
        exit 0
    fi
done
cd "$root"

# Brings what is missing; with --tests, what tests need as well.
install() {
    local python
    for python in python3.11 python3 python3.12 python3.13 python3.14; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$python" -m scripts.local.install "$@"
            return
        fi
    done
    echo "Python 3.11 or newer is needed (Debian 12: apt-get install python3), and none is on the PATH." >&2
    exit 1
}

require_installed() {
    if [[ ! -x .venv/bin/python ]]; then
        echo "Nothing is installed here yet; scripts/up does that." >&2
        exit 1
    fi
}
