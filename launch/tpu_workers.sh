# Sourced by tpu_vm.sh: what exists, and what its workers are told.
# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with tpu_vm.sh

# gcloud, with what its errors mean. In a dry run it is shown, and not run.
cloud() {
  local errors code=0
  if [[ -n $dry_run ]]; then
    say "gcloud$(quoted "$@")"
    return
  fi
  errors=$(mktemp)
  gcloud "$@" 2> "$errors" || code=$?
  if ((code)); then
    explain "$(< "$errors")" "$@"
  fi
  rm -f "$errors"
  return "$code"
}

explain() {
  local said=$1 hint=''
  shift
  case $said in
    *[Rr]eauthentication* | *invalid_grant* | *'gcloud auth login'* | *'refreshing your current auth'*)
      hint='your login has expired, or there is none: gcloud auth login' ;;
    *'has not been used'* | *SERVICE_DISABLED* | *'is not enabled'*)
      hint='enable the API: gcloud services enable tpu.googleapis.com' ;;
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      hint='no quota for this type in this zone: ask for it under IAM & Admin > Quotas, or take another --zone or --type' ;;
    *ALREADY_EXISTS* | *'already exists'*) hint='choose another NAME, or delete that one' ;;
    *PERMISSION_DENIED* | *'does not have permission'*) hint='this account needs the role TPU Admin in the project' ;;
  esac
  say "error: gcloud$(quoted "${@:1:5}") ... failed: ${said:-it says nothing}${hint:+
  $hint}"
}

# ---- what exists ------------------------------------------------------------------------------------------------

# --quiet: nobody is there to answer a question, such as one about a first ssh key.
queued() { cloud compute tpus queued-resources "$@" "--zone=$zone" "--project=$project" --quiet; }
vms() { cloud compute tpus tpu-vm "$@" "--zone=$zone" "--project=$project" --quiet; }

# The state of the queued resource; nothing where there is none.
state() {
  local found
  if [[ -n $dry_run ]]; then
    return
  fi
  found=$(queued list "--filter=name~/$name\$" '--format=value(state.state)') || return
  found=${found##*=} # some versions of gcloud print state=ACTIVE
  printf '%s' "${found%%[^A-Z_]*}"
}

# The same, for one who is in the middle of something: a network that is away for a while ends nothing.
state_at_last() {
  local tries
  for tries in 1 2 3 4 5; do
    state && return
    sleep "$((tries * ${POLL%.*}))"
  done
  return 1
}

# Sets `workers` to "NODE INDEX" of all workers of all slices.
find_workers() {
  local listed node addresses index
  workers=()
  if [[ -n $dry_run ]]; then
    workers=("$name 0")
    return
  fi
  listed=$(vms list "--filter=queuedResource~/$name\$" \
    '--format=csv[no-heading,separator=" "](name.basename(),networkEndpoints.len())' | sort -V) || return
  while read -r node addresses; do
    [[ -n $node ]] || continue
    for ((index = 0; index < addresses; index++)); do
      workers+=("$node $index")
    done
  done <<< "$listed"
  ((${#workers[@]})) || fail "$name has no workers: tpu_vm.sh status $name"
}

# Runs a command line on a worker, by its number.
on_worker() {
  local node index
  read -r node index <<< "${workers[$1]}"
  vms ssh "$node" "--worker=$index" --strict-host-key-checking=no "${ssh_flags[@]}" "--command=$2"
}

# Runs on every worker the command line that `$1 NUMBER` prints; what they print is in $scratch/NUMBER. Fails with the
# first one that does, after all have ended.
on_workers() {
  local number pids=() code=0
  for number in "${!workers[@]}"; do
    while (($(jobs -rp | wc -l) >= MAX_SSH)); do sleep 0.1; done
    on_worker "$number" "$("$1" "$number")" > "$scratch/$number" 2> "$scratch/$number.errors" &
    pids+=($!)
  done
  for number in "${!pids[@]}"; do
    wait "${pids[number]}" && continue
    ((code)) || say "worker ${workers[number]}: $(tail -n 5 "$scratch/$number.errors")"
    code=1
  done
  [[ -z $dry_run ]] || cat "$scratch"/*.errors >&2
  return "$code"
}

# ---- what workers do -----------------------------------------------------------------------------------------------

pack() {
  git -C "$root" rev-parse --is-inside-work-tree > /dev/null 2>&1 || fail "$root is no git checkout: which of its files are code is not known"
  # What git knows, as it is here, changed or not; and new files that it does not ignore.
  git -C "$root" ls-files -z --cached --others --exclude-standard --deduplicate |
    (cd "$root" && while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done) |
    tar -C "$root" --null --no-recursion --mtime=@0 --owner=0 --group=0 --numeric-owner -T - -cf - |
    gzip -n > "$scratch/code.tgz"
  digest=$(sha256sum "$scratch/code.tgz" | cut -c 1-16)
  (($(wc -c < "$scratch/code.tgz") < 200000000)) || fail "$root holds more than 200 MB that git does not ignore"
}

install_command() {
  printf '%s' "set -e; if [ -e mathscale/code/launch/worker.sh ] && [ \"\$($WORKER state)\" = running ]; then
    echo 'a command is running here: stop it first' >&2; exit 1; fi
    rm -rf mathscale/new && mkdir -p mathscale/new && tar -xzf mathscale-code.tgz -C mathscale/new
    rm -rf mathscale/code && mv mathscale/new mathscale/code && $WORKER install $digest"
}
nothing() { echo true; }
digest_command() { echo 'cat mathscale/digest 2> /dev/null || true'; }
version_command() { echo "$WORKER version"; }

setup() {
  local number node index pids=()
  [[ -n $digest ]] || pack
  find_workers || return
  say "$name: setting up ${#workers[@]} workers"
  # A VM that is new may not answer yet.
  for number in 1 2 3 4 5 6; do
    on_workers nothing && break
    ((number < 6)) || return 1
    sleep "$POLL"
  done
  if [[ -z $dry_run ]] && on_workers digest_command && [[ $(cat "$scratch"/[0-9]* | sort -u) == "$digest" ]]; then
    check_versions
    return
  fi
  for number in "${!workers[@]}"; do
    read -r node index <<< "${workers[number]}"
    vms scp "$scratch/code.tgz" "$node:mathscale-code.tgz" "--worker=$index" --strict-host-key-checking=no \
      "${ssh_flags[@]}" > /dev/null &
    pids+=($!)
  done
  for number in "${!pids[@]}"; do wait "${pids[number]}" || return 1; done
  on_workers install_command || return 1
  check_versions
}

# All workers must hold the same code and packages: a run of several versions ends in wrong numbers, or in silence.
check_versions() {
  local number first
  on_workers version_command || return 1
  [[ -z $dry_run ]] || return 0
  first=$(< "$scratch/0")
  for number in "${!workers[@]}"; do
    [[ $(< "$scratch/$number") == "$first" ]] || fail "worker ${workers[number]} has other versions than worker ${workers[0]}: tpu_vm.sh setup $name
  $first
  $(< "$scratch/$number")"
  done
  say "$name: ${#workers[@]} workers with $first"
}

# The command line that starts the command on a worker.
start_command() {
  local word words_here=()
  for word in "${words[@]}"; do
    words_here+=("${word//\{shard\}/$1/${#workers[@]}}")
  done
  # A worker of several of a slice, which have four chips each, is told that it stands alone.
  if [[ ${words[*]} == *'{shard}'* ]] && grep -q " 1$" <<< "$(printf '%s\n' "${workers[@]}")"; then
    words_here=(env 'TPU_PROCESS_BOUNDS=1,1,1' 'TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1' "${words_here[@]}")
  fi
  printf '%s start' "$WORKER"
  for word in "${words_here[@]}"; do # in the quotes that every shell knows: which one answers is not known here
    printf " '%s'" "${word//\'/\'\\\'\'}"
  done
}

start() {
  check_versions || return
  on_workers start_command
}

offset=0
state_command() { if (($1)); then echo "$WORKER state"; else echo "$WORKER state $offset"; fi; }
stop_command() { echo "$WORKER stop"; }

# Follows the command to its end on every worker: 0, AGAIN where it is to be begun again, GONE where the TPU is, else 1.
follow() {
  local number line size misses=0 running worst failed
  offset=0
  [[ -z $dry_run ]] || { on_workers state_command && return; }
  while :; do
    if [[ -n $deadline ]] && ((SECONDS > deadline)); then
      say "$name: --hours $hours are over: stopping"
      on_workers stop_command || true
      deadline='' is_over=1
    fi
    if ! on_workers state_command; then
      [[ $(state_at_last) == ACTIVE ]] || return "$GONE"
      ((++misses < 5)) || { say "$name does not answer"; return "$GONE"; }
      sleep "$POLL"
      continue
    fi
    misses=0 running=0 worst=0 failed=''
    for number in "${!workers[@]}"; do
      read -r line < "$scratch/$number" || true
      case $line in
        running) running=$((running + 1)) ;;
        'ended 0') ;;
        # It saved, or was ended by jax or the system since another one is; or its machine was started anew.
        'ended 75' | 'ended 134' | 'ended 143' | lost) worst=$((worst > AGAIN ? worst : AGAIN)) ;;
        ended*) worst=$((AGAIN + 1)) failed=${failed:-$number} ;;
        *) say "worker ${workers[number]} runs nothing"; return 1 ;;
      esac
      if ((number == 0)); then
        size=$(($(wc -c < "$scratch/0") - ${#line} - 1))
        tail -c "+$((${#line} + 2))" "$scratch/0"
        offset=$((offset + size))
      fi
    done
    if ((running == 0)); then
      ((worst)) || return 0
      ((worst != AGAIN)) || return "$AGAIN"
      say "worker ${workers[failed]} $(head -n 1 "$scratch/$failed"); the end of its output:"
      say "$(on_worker "$failed" 'tail -n 20 mathscale/run/log' || true)"
      return 1
    fi
    sleep "$POLL"
  done
}

gather() {
  local number node index folder
  [[ -z $dry_run ]] || return 0
  folder=runs/launch/$name/$(date -u +%Y%m%d-%H%M%S)
  mkdir -p "$folder"
  for number in "${!workers[@]}"; do
    read -r node index <<< "${workers[number]}"
    on_worker "$number" 'cat mathscale/run/log' > "$folder/$node-worker-$index.log" 2> /dev/null || true
  done
  say "$name: the logs of all workers are in $folder"
}
