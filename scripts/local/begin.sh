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

# Prints the Python to install with, of those on the PATH: the first that was compiled with profiles, as distributions do and
# pyenv does not unless it is told to (docs/decisions/0034); else the first that can make virtual environments; else the first.
chosen_python() {
    local found how plain="" bare=""
    for found in $(type -aP python3.11 python3 python3.12 python3.13 python3.14); do
        how="$("$found" 2>/dev/null -c 'import importlib.util, sys, sysconfig
profiled = sys.base_prefix == "/usr" or "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
bare = importlib.util.find_spec("ensurepip") is None
print("too old" if sys.version_info < (3, 11) else "bare" if bare else "profiled" if profiled else "plain")' || true)"
        case "$how" in
            profiled) echo "$found" && return ;;
            plain) plain="${plain:-$found}" ;;
            bare) bare="${bare:-$found}" ;;
        esac
    done
    echo "${plain:-$bare}"
}

# Brings what is missing; with --tests, what tests need as well.
install() {
    local python
    python="$(chosen_python)"
    if [[ -z "$python" ]]; then
        echo "Python 3.11 or newer is needed (Debian 12: apt-get install python3), and none is on the PATH." >&2
        exit 1
    fi
    "$python" -m scripts.local.install "$@"
}

require_installed() {
    if [[ ! -x .venv/bin/python ]]; then
        echo "Nothing is installed here yet; scripts/up does that." >&2
        exit 1
    fi
}
