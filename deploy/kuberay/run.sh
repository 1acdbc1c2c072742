#!/bin/sh
# What a RayJob runs: `run.sh NAME RECIPE [a.b=c …]`. A second try (`backoffLimit`), or another job of that NAME, goes on from the
# newest checkpoint. The ConfigMap `asyncrl` holds this file, the deployment and recipes; data lies at absolute paths, under /runs say.
set -eu
name=$1
recipe=$2
shift 2
resume=
for step in "${RUNS:-/runs}/$name"/checkpoints/step_*; do
    [ ! -d "$step" ] || resume=--resume
done
exec asyncrl run "$recipe" "$@" --deploy "${0%/*}/deployment.yaml" --runs-dir "${RUNS:-/runs}" --name "$name" $resume
