#!/usr/bin/env bash
# A local Ray cluster, the whole quickstart recipe as a Ray job, and the cluster stopped again. Run by `make quickstart`.
#
# The cluster is this script's own: free ports, its own folder, its own process group. Another Ray on this machine is
# neither used nor stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" RAY_AUTH_MODE=token
read -r gcs dashboard agent client cpus < <(python - <<'PY'
import os, socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
# Two training workers need two; more than eight would only hold more copies of a tiny model.
print(*(s.getsockname()[1] for s in sockets), min(max(os.cpu_count() or 2, 2), 8))
PY
)
folder=$(mktemp -d "${TMPDIR:-/tmp}/ultralong.XXXXXX")
ray get-auth-token --generate >/dev/null
python -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' ray start --head --block --node-ip-address 127.0.0.1 --port "$gcs" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
  --dashboard-agent-listen-port "$agent" --ray-client-server-port "$client" --temp-dir "$folder" \
  --num-cpus "${RAY_CPUS:-$cpus}" --disable-usage-stats >"$folder/head.log" 2>&1 &
head=$!
stop() { trap - EXIT; kill -TERM -- "-$head" 2>/dev/null || true; wait "$head" 2>/dev/null || true; rm -rf "$folder"; }
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
address="http://127.0.0.1:$dashboard"
for _ in $(seq 120); do
  ray job list --address "$address" >/dev/null 2>&1 && break
  kill -0 "$head" 2>/dev/null || { cat "$folder/head.log" >&2; exit 1; }
  sleep 0.5
done
echo "Ray dashboard: $address  (it asks for the token that 'ray get-auth-token' prints)"
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
ray job submit --address "$address" --working-dir . --runtime-env-json "{\"env_vars\": {\"GIT_COMMIT\": \"$commit\"}}" -- \
  python jobs/pipeline.py jobs/recipes/quickstart.toml --workdir "$PWD/runs/quickstart" "$@"
report=$(ls -t runs/quickstart/report-*/report.html | head -n 1)
echo "Report: $PWD/$report"
