#!/usr/bin/env bash
# An evaluation in shards on the GPUs of one machine: each shard draws a share of the samples on GPUs of its own.
#
#   local.sh evaluate --shards 8 -- --task gsm8k --checkpoint runs/x --out runs/x/eval
#
# Behind -- stand the options of python -m eval sample. A shard that dies is begun again, and draws what is missing; when
# all have ended, the samples are graded and the report is written. Run again, it goes on where it was.
#
#   --shards N           default: one a GPU
#   --restarts N         times that a shard is begun again (5)
#   --dry-run            say what would be run, and run nothing
#
# Logs are in runs/local/. Meanwhile, python -m eval report DIR says what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -d $root/.venv ]] || PATH=$root/.venv/bin:$PATH
shards='' restarts=5 dry_run='' words=() gpus=() shells=()

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $1"
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

case ${1-} in
  -h | --help) usage; exit 0 ;;
  evaluate) shift ;;
  *) usage >&2; exit 2 ;;
esac
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; words=("$@"); break ;;
    --dry-run) dry_run=1 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --shards) shards=${2-}; shift ;;
    --restarts) restarts=${2-}; shift ;;
    *) fail "$1 is no option of local.sh (those of python -m eval sample go behind --): see --help" ;;
  esac
  shift
done

if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
  IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi > /dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
fi
shards=${shards:-${#gpus[@]}}
[[ $shards =~ ^[1-9][0-9]*$ ]] || fail "--shards $shards: a number from 1 on (there is no GPU to count)"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts $restarts must be a whole number"
((${#gpus[@]} % shards == 0)) || fail "--shards $shards does not divide the ${#gpus[@]} GPUs of this machine"
out=''
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --out) out=${words[i + 1]-} ;;
    --out=*) out=${words[i]#--out=} ;;
    --shard | --shard=*) fail '--shard is said by local.sh: give --shards N before --' ;;
  esac
done
[[ -n $out ]] || fail 'evaluate needs --out DIR behind --: all shards write there'

# One shard to its end, on its GPUs.
shard() {
  local code tries=0 each=$((${#gpus[@]} / shards)) own log=runs/local/shard-$1.log
  own=$(IFS=,; echo "${gpus[*]:$1*each:each}")
  [[ -z $own ]] || export CUDA_VISIBLE_DEVICES=$own
  if [[ -n $dry_run ]]; then
    say "${own:+CUDA_VISIBLE_DEVICES=$own }python -m eval sample$(printf ' %q' "${words[@]}") --shard $1/$shards"
    return
  fi
  : > "$log"
  while :; do
    code=0
    python -m eval sample "${words[@]}" --shard "$1/$shards" >> "$log" 2>&1 || code=$?
    case $code in
      0) return ;;
      2 | 130) break ;; # wrong use, or Ctrl-C: it would end like this again
    esac
    ((tries++ < restarts)) || break
    say "shard $1/$shards ended with $code: begun again ($tries of at most $restarts)"
    sleep 1
  done
  say "shard $1/$shards ended with $code; the end of $log:
$(tail -n 5 "$log")"
  return "$code"
}

[[ -n $dry_run ]] || mkdir -p runs/local
trap 'trap - TERM; kill 0' TERM
for ((i = 0; i < shards; i++)); do
  shard "$i" &
  shells+=($!)
done
[[ -n $dry_run ]] || say "$shards shards draw; logs in runs/local/; so far: python -m eval report $out"
worst=0
for pid in "${shells[@]}"; do
  code=0
  wait "$pid" || code=$?
  ((code <= worst)) || worst=$code
done
((worst == 0)) || exit "$worst"
if [[ -n $dry_run ]]; then
  say "python -m eval grade $out; python -m eval report $out"
  exit
fi
python -m eval grade "$out"
python -m eval report "$out"
