/** How a server's data become an archive that was proved: the shell of `make backup`, and of the program on the server. */
import { sh } from "../sh.ts";
import { ENTRY_FOLDER } from "./devices.ts";

export const DATA = "/var/lib/rancher/k3s/server";

const PYTHON = `import sqlite3, sys
for row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]):
    print("|".join(str(value) for value in row))`;

/** kine keeps a row a revision: an object is there if the newest row of its name says so. */
const countOf = (what: string, folder: string) =>
  `select '${what}=' || count(*) from kine as one where name >= '/registry/${folder}/' and name < '/registry/${folder}0' and deleted = 0 and id = (select max(id) from kine where name = one.name)`;
const COUNTS = [
  "select 'revision=' || max(id) from kine",
  countOf("nodes", "minions"),
  countOf("deployments", "deployments"),
  countOf("secrets", "secrets"),
].join(" union all ");

/**
 * Shell functions. `pack FOLDER NAME ABOUT` leaves FOLDER/NAME.tar.gz, which has ABOUT as its first member, and nothing
 * else in a FOLDER of its own. It stands alone in its line: behind || or if, the shell would ignore what fails in it.
 */
export const PACK = sh`sql() {
  if command -v sqlite3 >/dev/null; then
    sqlite3 -batch -noheader -list "$1" "$2"
    return
  fi
  for python in python3 python2 python /usr/libexec/platform-python; do
    if "$python" -c 'import sqlite3' 2>/dev/null; then
      "$python" -c ${PYTHON} "$1" "$2"
      return
    fi
  done
  return 127
}
damaged() { echo "The datastore is damaged: $(tail -n 1 said)"; exit 1; }
# What the database in the folder $1 has. It is opened as a copy: SQLite would write its log into it.
listed() (
rm -rf check
cp -Rp "$1" check
status=0
sql check/state.db 'pragma integrity_check(1)' >said 2>&1 || status=$?
if [ "$status" = 127 ]; then
  echo unverified >list
else
  [ "$status:$(cat said)" = 0:ok ] || damaged
  sql check/state.db ${COUNTS} >list 2>said || damaged
  grep -q '^revision=[1-9]' list || { echo 'The datastore is empty'; exit 1; }
fi
rm -rf check said
)
pack() (
set -eu
umask 077
rm -rf "$1"
mkdir -p "$1"
cd "$1"
# One at a time: the end of one's pause would end the other's. What watches over the pause holds it too.
exec 8>>${`${DATA}/.backup-lock`}
flock -w 300 8 || { echo 'Another backup still runs'; exit 1; }
free=$(df -Pk . | awk 'NR == 2 { print $4 }')
# shellcheck disable=SC2012 # the names are known
needs=$(ls -ln ${DATA}/db/state.db ${DATA}/db/state.db-wal 2>/dev/null | awk '{ size += $5 } END { printf "%.0f", size * 2.5 / 1024 + 10240 }')
[ "$free" -gt "$needs" ] || { echo "There is too little room for a backup in $1: $free kB, and it may take $needs kB"; exit 1; }
mkdir -p data/db
cd data
printf '%s\n' "$3" >about
cp -p /etc/rancher/node/password node-password
# A backup has no links: what they lead to goes with it.
for path in token tls cred manifests; do cp -RLp ${DATA}/$path .; done
devices=; [ ! -e ${ENTRY_FOLDER} ] || { devices=devices; cp -RLp ${ENTRY_FOLDER} devices; }
# SQLite reads a database and its log as they stood at one moment, whatever was being done then. So k3s, all its
# threads, is stopped for the copy; whatever becomes of this script, it goes on after 20 s.
pid=$(systemctl show k3s -p MainPID | cut -d= -f2)
if [ "$pid" != 0 ]; then
  trap 'kill -CONT "$pid"' EXIT
  trap 'exit 1' TERM INT HUP
  : >stopped
  (
    trap '' TERM
    n=0
    while [ "$n" -lt 20 ] && [ -e stopped ]; do sleep 1; n=$((n + 1)); done
    kill -CONT "$pid"
  ) >/dev/null 2>&1 &
  kill -STOP "$pid"
  tries=0
  while grep -h '^State:' /proc/"$pid"/task/*/status | grep -qv 'T (stopped)'; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || { echo 'k3s could not be paused'; exit 1; }
    sleep 0.05
  done
fi
cp -p ${DATA}/db/state.db db/
[ ! -e ${DATA}/db/state.db-wal ] || cp -p ${DATA}/db/state.db-wal db/
if [ "$pid" != 0 ]; then
  state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' /proc/"$pid"/status)
  kill -CONT "$pid"
  rm stopped
  [ "$state" = T ] || { echo 'The copy took more than 20 s: k3s went on before it was whole'; exit 1; }
fi
listed db
# shellcheck disable=SC2086
tar -czf ../made about list node-password token tls cred manifests db $devices
# To its end, for gzip's checksum.
tar -tzf ../made >/dev/null
[ "$(tar -xzOf ../made db/state.db | sha256sum)" = "$(sha256sum <db/state.db)" ] || { echo 'The archive is not what was copied'; exit 1; }
cd ..
sync
mv made "$2.tar.gz"
rm -rf data
)`;
