#!/usr/bin/env bash
# Runs commands on Cloud TPU VMs, with gcloud alone: from nothing to a finished run, and back to nothing.
#
#   tpu_vm.sh job NAME --type v5litepod-16 [--spot] -- python -m mathscale_jax.train --config ... output_dir=gs://...
#   tpu_vm.sh evaluate NAME --type v5litepod-16 [--spot] -- --task gsm8k --checkpoint gs://... --out gs://...
#
# job creates the TPU, sets up every worker, runs the command on all of them, follows it to its end, and deletes the TPU,
# however it ended. A TPU that is pre-empted is made again, and the same command goes on from its checkpoint. evaluate is
# a job in which every worker draws a share of the samples (python -m eval sample --shard); then one grades and reports.
# The single steps:
#
#   tpu_vm.sh create NAME --type TYPE     a queued resource, waited for until it is there
#   tpu_vm.sh setup NAME                  this checkout's code and pinned packages on every worker
#   tpu_vm.sh run NAME -- COMMAND...      starts a command on every worker, and follows it; {shard} in it becomes i/N
#   tpu_vm.sh follow NAME                 follows what runs there
#   tpu_vm.sh status NAME                 what is there, and what runs on it
#   tpu_vm.sh stop NAME                   ends the command (it saves first); the TPU stays
#   tpu_vm.sh delete NAME                 ends everything
#
# Options:
#   --type TYPE          such as v5litepod-16, v5p-128, v6e-8 (gcloud compute tpus accelerator-types list)
#   --slices N           slices of that type, which train as one (1)
#   --spot               cheaper, and may be taken away at any time
#   --zone ZONE          default: gcloud's compute/zone          --project PROJECT   default: gcloud's project
#   --runtime VERSION    image of the VMs; default: the one for the type
#   --restarts N         times that a job is begun again after pre-emption or exit code 75 (20)
#   --wait HOURS         for a TPU to become free; then the request is deleted (24)
#   --hours HOURS        a job is stopped, and its TPU deleted, after so long (no limit)
#   --attach             job: go on with a TPU of this name that is there
#   --keep               job: leave the TPU there at the end
#   --create-flag FLAG   one more flag of gcloud's create, such as --create-flag=--reserved; may be repeated
#   --ssh-flag FLAG      one more flag of gcloud's ssh and scp, such as --ssh-flag=--tunnel-through-iap
#   --dry-run            say which gcloud commands would be run, and run none
#
# Exit codes: 0 done; 1 failed; 2 wrong use; 75 stopped, run it again; 130 Ctrl-C (what runs, runs on). Logs of all
# workers are gathered in runs/launch/NAME/.
set -euo pipefail

readonly POLL=${MATHSCALE_POLL:-20} # seconds between two looks
readonly MAX_SSH=32 # connections at once
readonly AGAIN=75 GONE=76 # what following a command ends with, beside 0 and 1
readonly WORKER='bash mathscale/code/launch/worker.sh'
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root

name='' type='' slices=1 zone='' project='' runtime='' restarts=20 wait_hours=24 hours='' each=''
spot='' attach='' keep='' dry_run='' may_exist='' deadline='' is_over='' digest=''
create_flags=() ssh_flags=() words=() workers=()

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $1"
  exit "${2:-1}"
}
quoted() { printf ' %q' "$@"; }

# shellcheck source=launch/tpu_workers.sh
source "$root/launch/tpu_workers.sh"

# ---- checks before anything costs money ------------------------------------------------------------------------

check_place() {
  command -v gcloud > /dev/null || [[ -n $dry_run ]] || fail 'gcloud is not installed: https://cloud.google.com/sdk' 2
  if [[ -z $dry_run ]]; then
    cloud auth print-access-token > /dev/null || exit 1
    project=${project:-$(cloud config get-value project)}
    zone=${zone:-$(cloud config get-value compute/zone)}
  fi
  project=${project#(unset)} zone=${zone#(unset)}
  [[ -n $project ]] || fail 'no project: give --project PROJECT, or gcloud config set project PROJECT' 2
  [[ -n $zone ]] || fail 'no zone: give --zone ZONE, such as us-west4-a, or gcloud config set compute/zone ZONE' 2
}

default_runtime() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type $type: which image its VMs take is not known here: give --runtime VERSION" 2 ;;
  esac
}

# Buckets that the command names: there at all, and near enough?
check_buckets() {
  local bucket location region=${zone%-*}
  while read -r bucket; do
    [[ -n $bucket ]] || continue
    location=$(cloud storage buckets describe "gs://$bucket" '--format=value(location)') || exit 1
    location=${location,,}
    case $location in
      '' | "$region" | us | eu | asia) ;;
      *) say "warning: gs://$bucket is in $location, the TPU in $region: slow, and its traffic is paid for" ;;
    esac
    case $location:$region in
      us:us-* | eu:europe-* | asia:asia-*) ;;
      us:* | eu:* | asia:*) say "warning: gs://$bucket is in $location, the TPU in $region: slow, and paid for" ;;
    esac
  done < <(printf '%s\n' "${words[@]}" | grep -o 'gs://[^/ ,}]*' | cut -c 6- | sort -u)
}

# ---- the steps ---------------------------------------------------------------------------------------------------

create() {
  local flags=("--accelerator-type=$type" "--runtime-version=$runtime")
  if ((slices > 1)); then
    flags+=("--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--node-id=$name")
  fi
  [[ -z $spot ]] || flags+=(--spot)
  may_exist=1
  queued create "$name" "${flags[@]}" "${create_flags[@]}" --async || exit 1
}

# Until it is ACTIVE: 0; where it was taken away: GONE.
wait_active() {
  local now before='' unseen=0 until=$((SECONDS + wait_hours * 3600))
  [[ -z $dry_run ]] || return 0
  while :; do
    now=$(state_at_last) || exit 1
    [[ $now == "$before" ]] || say "$name: ${now:-gone}"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED)
        say "$name was refused: $(queued describe "$name" '--format=value(state.failedData.error.message)')"
        exit 1 ;;
      SUSPENDING | SUSPENDED | DELETING) return "$GONE" ;;
      '') ((++unseen < 5)) || return "$GONE" ;; # it is listed a little later than it is made
    esac
    if ((SECONDS > until)); then
      say "$name was not free within $wait_hours hours (--wait): the request is deleted"
      delete
      exit "$AGAIN"
    fi
    sleep "$POLL"
  done
}

delete() {
  local tries
  for tries in 1 2 3; do
    if queued delete "$name" --force; then
      may_exist=''
      [[ -n $dry_run ]] || say "$name is deleted"
      return
    fi
    sleep "$POLL"
  done
  say "error: $name could not be deleted in $tries tries"
  return 1
}

# Runs `words` on a TPU that may be taken away, until they end for good.
persist() {
  local code count=0 now
  while :; do
    code=0
    now=$(state_at_last) || exit 1
    if [[ -n $now ]]; then may_exist=1; fi
    case $now in
      SUSPENDING | SUSPENDED | FAILED)
        say "$name was taken away: making it again"
        delete
        now='' ;;
    esac
    [[ -n $now ]] || create
    wait_active || code=$?
    if ((code == 0)) && ! is_running; then
      { setup && start; } || code=1
      if ((code)) && [[ -z $dry_run && $(state) != ACTIVE ]]; then code=$GONE; fi
    fi
    if ((code == 0)); then
      follow || code=$?
      ((code == GONE)) || gather
    fi
    if [[ -n $is_over ]]; then return "$((code ? AGAIN : 0))"; fi
    case $code in
      "$AGAIN" | "$GONE") ;;
      *) return "$code" ;;
    esac
    if ((count++ >= restarts)); then
      say "$name: begun again $restarts times (--restarts): given up; the same command goes on from its checkpoint"
      return "$AGAIN"
    fi
    say "$name: beginning again ($count of at most $restarts)"
    sleep "$POLL"
  done
}

is_running() {
  [[ -z $dry_run ]] && find_workers && on_workers state_command > /dev/null 2>&1 && [[ $(head -n 1 "$scratch/0") == running ]]
}

job() {
  local code=0 now
  [[ -n $type ]] || fail 'job needs --type TYPE, such as --type v5litepod-16' 2
  if ((${#words[@]} == 0)); then fail 'job needs a command: job NAME --type TYPE -- python -m mathscale_jax.train ...' 2; fi
  [[ ${words[*]} == *gs://* || -n $keep ]] ||
    fail 'nothing in the command is on gs://: what it writes would be deleted with the TPU. Name a bucket, or add --keep' 2
  [[ -n $runtime ]] || runtime=$(default_runtime) || exit 2
  check_buckets
  now=$(state) || exit 1
  if [[ -n $now && -z $attach ]]; then
    may_exist=1
    fail "$name exists already ($now): add --attach to go on with it, or delete it, or choose another NAME" 2
  fi
  [[ -z $hours ]] || deadline=$((SECONDS + hours * 3600))
  persist || code=$?
  if ((code == 0)) && [[ -n $each ]]; then
    find_workers
    workers=("${workers[0]}")
    # shellcheck disable=SC2016  # expanded by the shell on the worker
    words=(bash -c 'python -m eval grade "$0" && python -m eval report "$0"' "$each")
    { start && follow; } || code=1
    gather
  fi
  [[ -n $keep ]] || delete || code=1
  return "$code"
}

status() {
  local number now
  now=$(state) || exit 1
  [[ -n $now || -n $dry_run ]] || { say "$name does not exist in $zone of $project"; return; }
  may_exist=1
  say "$name: $now"
  [[ $now == ACTIVE ]] || return 0
  find_workers
  on_workers state_command || true
  for number in "${!workers[@]}"; do
    printf '%s: %s\n' "${workers[number]}" "$(head -n 1 "$scratch/$number")"
  done
}

# ---- the command line ------------------------------------------------------------------------------------------

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

finish() {
  local code=$?
  rm -rf "$scratch"
  if [[ -n $may_exist && -z $dry_run ]]; then
    say "$name may still exist, and cost money: tpu_vm.sh follow|stop|delete $name --zone $zone --project $project"
  fi
  exit "$code"
}

main() {
  local command=${1-} option
  case $command in
    -h | --help) usage; exit 0 ;;
    job | evaluate | create | setup | run | follow | status | stop | delete) ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
  if [[ ${1-} == -h || ${1-} == --help ]]; then usage; exit 0; fi
  name=${1-}
  [[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    fail "NAME ${name@Q}: lower-case letters, digits and -, at most 62, beginning with a letter" 2
  shift
  while (($#)); do
    option=$1
    case $option in
      --spot) spot=1; shift; continue ;;
      --attach) attach=1; shift; continue ;;
      --keep) keep=1; shift; continue ;;
      --dry-run) dry_run=1; shift; continue ;;
      --) shift; words=("$@"); break ;;
      --*=*) set -- "${option%%=*}" "${option#*=}" "${@:2}"; continue ;;
      --*) (($# > 1)) || fail "$option needs a value" 2 ;;
    esac
    case $option in
      --type) type=$2 ;;
      --slices) slices=$2 ;;
      --zone) zone=$2 ;;
      --project) project=$2 ;;
      --runtime) runtime=$2 ;;
      --restarts) restarts=$2 ;;
      --wait) wait_hours=$2 ;;
      --hours) hours=$2 ;;
      --create-flag) create_flags+=("$2") ;;
      --ssh-flag) ssh_flags+=("$2") ;;
      *) fail "$option is no option of tpu_vm.sh (a command goes behind --): see --help" 2 ;;
    esac
    shift 2
  done
  for option in "slices $slices" "restarts $restarts" "wait $wait_hours" "hours ${hours:-1}"; do
    [[ $option =~ ^[a-z]+\ [0-9]+$ ]] || fail "--${option/ /=} must be a whole number" 2
  done

  scratch=$(mktemp -d)
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  check_place
  case $command in
    job) job ;;
    evaluate)
      each=''
      for ((option = 0; option < ${#words[@]}; option++)); do
        case ${words[option]} in
          --out) each=${words[option + 1]-} ;;
          --out=*) each=${words[option]#--out=} ;;
        esac
      done
      [[ $each == gs://* ]] || fail 'evaluate needs --out gs://... behind --: all workers write there' 2
      words=(python -m eval sample "${words[@]}" --shard '{shard}')
      job ;;
    create)
      [[ -n $type ]] || fail 'create needs --type TYPE, such as --type v5litepod-16' 2
      [[ -n $runtime ]] || runtime=$(default_runtime) || exit 2
      option=$(state) || exit 1
      if [[ -n $option ]]; then may_exist=1; fail "$name exists already ($option): delete it, or choose another NAME" 2; fi
      create
      wait_active || fail "$name was taken away" ;;
    setup) may_exist=1; setup ;;
    run)
      ((${#words[@]})) || fail 'run needs a command: run NAME -- python -m mathscale_jax.train ...' 2
      may_exist=1
      check_buckets
      find_workers
      start
      say "$name: started; Ctrl-C leaves it running"
      option=0
      follow || option=$?
      ((option == GONE)) || gather
      ((option != GONE)) || { say "$name was taken away"; option=$AGAIN; }
      return "$option" ;;
    follow)
      may_exist=1
      find_workers
      option=0
      follow || option=$?
      return "$option" ;;
    status) status ;;
    stop) may_exist=1; find_workers; on_workers stop_command ;;
    delete) may_exist=1; delete ;;
  esac
}

main "$@"
