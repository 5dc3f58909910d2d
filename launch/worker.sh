#!/usr/bin/env bash
# What tpu_vm.py does on a worker, where it comes with the code.
#
#   worker.sh install DIGEST      the pinned environment, and a mark that the code of this digest is installed
#   worker.sh version             that digest, and the versions that all workers must share
#   worker.sh own TOKEN           who follows from now on
#   worker.sh start TAG WORD...   starts a command, which outlives the connection
#   worker.sh state [OFFSET]      a line: the owner's TOKEN, the command's TAG, and none | running | ended CODE | stopped
#                                 CODE | lost (its machine was started anew); behind it its output from this byte on
#   worker.sh stop                sends SIGTERM: the command saves, and ends with 75
set -euo pipefail

readonly UV_VERSION=0.13.9 PYTHON=3.11
readonly home=${MATHSCALE_HOME:-$HOME/mathscale}
readonly run=$home/run
PATH=$home/.venv/bin:$HOME/.local/bin:$PATH

boot_id() { cat /proc/sys/kernel/random/boot_id; }

state() {
  local ended=ended
  [[ ! -e $run/stopped ]] || ended=stopped
  if [[ ! -e $run/pid ]]; then
    echo none
  elif [[ -e $run/code ]]; then
    echo "$ended $(< "$run/code")"
  elif [[ $(< "$run/boot") == "$(boot_id)" ]] && kill -0 "$(< "$run/pid")" 2> /dev/null; then
    echo running
  elif [[ -e $run/code ]]; then # it ended between the two looks
    echo "$ended $(< "$run/code")"
  else
    echo lost
  fi
}
kept() { cat "$1" 2> /dev/null || echo -; }

case ${1-} in
  install)
    cd "$home/code"
    # The images bring an older Python than is needed here: uv brings its own.
    command -v uv > /dev/null || curl -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" | sh > /dev/null
    uv venv --quiet --clear --python "$PYTHON" "$home/.venv"
    uv pip install --quiet --python "$home/.venv/bin/python" -c constraints.txt -e '.[tpu,gcs]'
    echo "$2" > "$home/digest"
    ;;
  version)
    [[ -e $home/digest ]] || { echo "nothing is installed"; exit; }
    python - "$(< "$home/digest")" << 'PYTHON'
import importlib.metadata, platform, sys

names = ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint")
installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
print(sys.argv[1], "python", platform.python_version(), *(f"{n} {installed.get(n, 'none')}" for n in names))
PYTHON
    ;;
  own)
    mkdir -p "$home"
    echo "$2" > "$home/owner"
    ;;
  start)
    tag=$2
    shift 2
    if [[ $(state) == running ]]; then
      echo "a command is running here: $(< "$run/command")" >&2
      exit 3
    fi
    rm -rf "$run"
    mkdir -p "$run"
    boot_id > "$run/boot"
    echo "$tag" > "$run/tag"
    printf '%q ' "$@" > "$run/command"
    cd "$home/code"
    # The shell around it hears SIGTERM, too, and lives to write down what the command ended with.
    # shellcheck disable=SC2016  # expanded by that shell
    setsid nohup bash -c 'trap : TERM; "$@" & child=$!
        while code=0; wait "$child" || code=$?; kill -0 "$child" 2> /dev/null; do :; done
        echo "$code" > "$0/code.new"; mv "$0/code.new" "$0/code"' "$run" "$@" < /dev/null > "$run/log" 2>&1 &
    echo $! > "$run/pid"
    ;;
  state)
    echo "$(kept "$home/owner") $(kept "$run/tag") $(state)"
    [[ -z ${2-} || ! -e $run/log ]] || tail -c "+$(($2 + 1))" "$run/log"
    ;;
  stop)
    if [[ $(state) == running ]]; then
      touch "$run/stopped"
      pkill -TERM -P "$(< "$run/pid")" || true
    fi
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
