#!/usr/bin/env bash
# From a cluster without the operator to an answer from an adapter that was trained on it.
#
#     demo/cluster.sh NAMESPACE [helm option ...]
#
# kubectl and helm must reach the cluster, whose nodes must know the images. NAMESPACE must exist, with a claim `demo`
# (ReadWriteMany) that is empty. Set QLORA_OPERATOR_IMAGE and QLORA_TRAINER_IMAGE (repository:tag), or pass helm
# options that name them. `make cluster-demo` does all this on two nodes of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

namespace=${1:?usage: demo/cluster.sh NAMESPACE [helm option ...]}
shift
operator=${QLORA_OPERATOR_IMAGE:-qlora-operator:0.1.0}
trainer=${QLORA_TRAINER_IMAGE:-qlora-trainer:0.1.0}
python=${PYTHON:-.venv/bin/python}
files=${DEMO_FILES:-.cache/demo}    # with model/ and data/, as `make demo-data` writes them
out=${DEMO_OUT:-.cache/cluster-demo} # gets the adapter

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
in_team() { kubectl --namespace "$namespace" "$@"; }
shell() { in_team exec -i workspace-shell -- "$@"; }

run helm upgrade --install qlora-operator charts/qlora-operator --namespace qlora-system --create-namespace \
    --set "image.repository=${operator%:*},image.tag=${operator##*:}" \
    --set "jobs.image.repository=${trainer%:*},jobs.image.tag=${trainer##*:}" "$@"
run kubectl --namespace qlora-system rollout status deployment/qlora-operator --timeout=180s

echo; echo "# The claim gets the model and the data."
sed -e "s|qlora-trainer:0.1.0|$trainer|" -e "s|claimName: .*|claimName: demo|" \
    manifests/workspace-shell.yaml | in_team apply -f -
run kubectl --namespace "$namespace" wait --for=condition=Ready pod/workspace-shell --timeout=180s
tar -c -C "$files" model data | shell tar -x -C /volume

run kubectl --namespace "$namespace" apply -f manifests/samples/two-nodes.yaml
kubectl --namespace "$namespace" get qlorajobs demo --watch & # not through a function: this very process is ended
watch=$!
trap 'kill "$watch" 2>/dev/null || true' EXIT
in_team wait --for=condition=Finished qlorajob/demo --timeout=20m >/dev/null
kill "$watch"; wait "$watch" 2>/dev/null || true
run kubectl --namespace "$namespace" get qlorajobs demo -o wide
phase=$(in_team get qlorajob demo -o 'jsonpath={.status.phase}')
if [ "$phase" != Succeeded ]; then
    in_team describe qlorajob demo
    in_team logs -l qlora.dev/job-name=demo --prefix --tail=20
    exit 1
fi

echo; echo "# The adapter comes back, and answers a question on this machine."
rm -rf "$out" && mkdir -p "$out"
shell tar -c -C /volume/work/jobs/demo adapter | tar -x -C "$out"
in_team delete pod workspace-shell --wait=false
"$python" demo/ask.py "$files/model" "$out/adapter"
