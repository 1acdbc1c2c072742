#!/bin/sh
# preStop of a worker, when Kubernetes takes its pod: a spot node that goes, `kubectl drain`, the autoscaler. Ray hears of it before
# the processes end: nothing new comes here, and what dies was preempted. `drain.sh SECONDS` waits as long as Ray was told that it has.
seconds=$1
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "Kubernetes takes the pod" \
    --deadline-remaining-seconds "$seconds" || true
sleep "$seconds"
