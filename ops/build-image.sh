#!/usr/bin/env bash
# Builds the image and sees it serve, on a machine without a Docker engine (with one: `docker build .`).
#
# The base image is made by debootstrap, since none can be pulled without a registry; packages come from the mirrors that
# this machine's apt and pip are configured for. The image's own command then runs as process 1 of a namespace of its
# own, as the image's user, takes an update over HTTP and is stopped with SIGTERM. Everything lives in one temporary
# folder, which is gone at the end; TMPDIR says where, and it takes about 3 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "build-image: $*" >&2
  exit 1
}

[ "$(id -u)" = 0 ] || fail "run it as root: debootstrap and chroot need it."
for tool in buildah debootstrap unshare apt-get curl python3; do
  command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install buildah debootstrap util-linux curl python3."
done
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
  awk -v codename="$codename" '$1 == codename && $2 == "main" { print $3; exit }')
[ -n "$mirror" ] || fail "apt knows no mirror of \"$codename\": run apt-get update on a Debian machine that has one."

work=$(mktemp -d --tmpdir voicetx-image.XXXXXX)
umask 022
chmod 0755 "$work"
unshare_pid=

clean_up() {
  status=$?
  trap - EXIT
  # --kill-child ends what runs inside.
  if [ -n "$unshare_pid" ]; then kill -KILL "$unshare_pid" 2>/dev/null || true; fi
  build umount --all >/dev/null 2>&1 || true
  # Nothing of the machine may be mounted below the folder when it is removed.
  awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | sort -r | while read -r point; do umount "$point"; done
  if grep -q " $work/" /proc/mounts; then
    echo "build-image: $work still holds a mount: unmount and remove it." >&2
  else
    rm -rf --one-file-system "$work"
  fi
  [ "$status" = 0 ] || echo "build-image: failed." >&2
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

build() {
  command buildah --storage-driver vfs --root "$work/storage" --runroot "$work/run" "$@"
}

step() {
  echo "== $*"
}

step "base: $codename with python3"
base=$(build from scratch)
base_root=$(build mount "$base")
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$codename" "$base_root" "$mirror" \
  >"$work/debootstrap.log" 2>&1 || { tail -n 20 "$work/debootstrap.log" >&2; fail "debootstrap failed."; }
rm -rf "$base_root"/var/cache/apt/archives/*.deb "$base_root"/var/lib/apt/lists/*
# pip in the build is configured as pip on this machine is: its files, its PIP_* variables, its certificates.
volumes=()
python3 - "$base_root" <<'PYTHON' >"$work/volumes"
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(sys.argv[1])
listed = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
).stdout
options = {}
for line in listed.splitlines():  # the variables are listed last, and win
    match = re.fullmatch(r"(global|install|wheel|:env:)\.([a-z-]+)='(.*)'", line)
    if match:
        options[match[2]] = match[3].replace("\\n", "\n")
certificates = Path(options.get("cert") or os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
if certificates.is_file():
    options["cert"] = "/etc/pip-certificates.crt"
    shutil.copyfile(certificates, root / "etc/pip-certificates.crt")
parser = configparser.RawConfigParser()
parser["global"] = {name: value.replace("\n", "\n    ") for name, value in options.items()}
with (root / "etc/pip.conf").open("w") as file:
    parser.write(file)
for name in ("index-url", "extra-index-url", "find-links"):
    for place in options.get(name, "").split():
        path = Path(place.removeprefix("file://"))
        if path.is_absolute() and path.is_dir():
            # A folder of links beside its files: the folder above holds both.
            print(path.parent if path.name == "simple" else path)
PYTHON
while read -r folder; do volumes+=(--volume "$folder:$folder:ro"); done <"$work/volumes"
build umount "$base" >/dev/null
build commit --quiet "$base" localhost/voicetx-base >/dev/null
build rm "$base" >/dev/null

step "image: buildah bud"
build bud --isolation chroot --format docker --build-arg BASE=localhost/voicetx-base "${volumes[@]}" --tag voicetx . \
  >"$work/bud.log" 2>&1 || { tail -n 40 "$work/bud.log" >&2; fail "the build failed."; }

container=$(build from --pull-never voicetx)
root=$(build mount "$container")
build inspect --type image voicetx >"$work/image.json"
# One value of the image's configuration, one word a line.
configured() {
  python3 -c '
import json, sys
value = json.load(open(sys.argv[1]))["Docker"]["config"]
for name in sys.argv[2:]:
    value = value.get(name) or ""
print(*value if isinstance(value, list) else [value], sep="\n")' "$work/image.json" "$@"
}
user=$(configured User)
folder=$(configured WorkingDir)
mapfile -t variables < <(configured Env)
mapfile -t entrypoint < <(configured Entrypoint)
mapfile -t command < <(configured Cmd)
mapfile -t healthcheck < <(configured Healthcheck Test)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
address=http://127.0.0.1:$port
# Inside the image: its files, user, folder and environment, and no other variable but the host and port to listen on.
inside=(chroot "--userspec=$user" "$root" /usr/bin/env --ignore-environment "--chdir=$folder" "${variables[@]}"
  VOICETX_HOST=127.0.0.1 "VOICETX_PORT=$port")

# Starts a command as process 1, and waits until it answers; sets unshare_pid and process.
start() {
  unshare --fork --pid --kill-child --mount --mount-proc="$root/proc" "${inside[@]}" "$@" >"$work/service.log" 2>&1 &
  unshare_pid=$!
  for _ in $(seq 300); do
    if curl --silent --fail --output /dev/null "$address/readyz"; then
      process=$(cat "/proc/$unshare_pid/task/$unshare_pid/children")
      process=${process%% *}
      return
    fi
    kill -0 "$unshare_pid" 2>/dev/null || break
    sleep 0.2
  done
  cat "$work/service.log" >&2
  fail "it did not become ready."
}

stop() {
  kill -TERM "$process"
  status=0
  wait "$unshare_pid" || status=$?
  unshare_pid=
  [ "$status" = 0 ] || { cat "$work/service.log" >&2; fail "it ended with status $status after SIGTERM."; }
}

# Sends one update with the given key for the given transaction.
report() {
  body='"call-starttime":"2026-01-31 08:00:58.211","call-endtime":"2026-01-31 08:01:59.200","call-source":"2"'
  body="{\"transaction-id\":\"$2\",$body,\"call-state\":\"5\",\"drop-code\":\"2005\"}"
  answer=$(curl --silent --show-error --request PUT "$address/campaignapi/resources/v3/voicecampaigntransactions" \
    --header "authorization: Bearer $1" --header 'content-type: application/json' --data "$body")
  [ "$answer" = "{\"transaction-id\":\"$2\"}" ] || fail "the update was answered $answer"
  echo "the update was answered $answer"
}

step "run: ${entrypoint[*]} ${command[*]}, as $user in $folder"
start "${entrypoint[@]}" "${command[@]}"
echo "ready: $(curl --silent "$address/readyz")"
case $(grep '^Uid:' "/proc/$process/status") in *[[:space:]]0[[:space:]]*) fail "it runs as root." ;; esac
[ "${healthcheck[0]}" = CMD ] || fail "the health check is not in exec form."
"${inside[@]}" "${healthcheck[@]:1}" || fail "the health check fails."
key=$("${inside[@]}" "${entrypoint[@]}" user add dialer --grant transactions:update --json |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["secret_key"])')
"${inside[@]}" "${entrypoint[@]}" deployment create january >/dev/null
id=$("${inside[@]}" "${entrypoint[@]}" deployment mint january 1)
report "$key" "$id"
stop
if "${inside[@]}" "${healthcheck[@]:1}" 2>/dev/null; then fail "the health check succeeds where nothing runs."; fi
shown=$("${inside[@]}" "${entrypoint[@]}" transaction show "$id")
grep -q '^updates *1$' <<<"$shown" || fail "the update is not there after the stop: $shown"
echo "stopped by SIGTERM with status 0; the update is on the volume"

step "run: ${entrypoint[*]} demo"
start "${entrypoint[@]}" demo
report "$(cat "$root$folder/.voicetx/secret-key")" demo-001
stop

step "size: $(du -sm "$root/opt/voicetx" | cut -f1) MB of Python packages, $(du -sm --exclude=./proc "$root" | cut -f1) MB with the base"
echo "build-image: green."
