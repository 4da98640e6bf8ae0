#!/usr/bin/env bash
# The paper's seven zero-shot settings of its MDM. Arguments are handed on: ./eval_mdm.sh --limit 100 --output_path out/eval
# ./eval_mdm.sh --dry_run only tells what it would cost.
#
# LAUNCH="torchrun --nproc_per_node 8" starts each evaluation on eight GPUs. CKPT=FILE names another checkpoint (MODEL its size, where the file does
# not say); everything else as published. With nll_type='exact' instead of 'mc' the same bound takes a small part of the passes
# (docs/results/likelihood.md). A setting that fails does not keep the others from running; the last lines name it, and the exit code is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

ckpt=${CKPT:-models/mdm-1028M-3300e18-rsl-0.01-bs-1024.safetensors}
model=${MODEL:-}
[ -n "${CKPT:-}" ] || model=${model:-1028}
read -ra launch <<<"${LAUNCH:-python}"
count=0 failed=()
# Ctrl-C and the like are meant for all of them.
trap 'exit 130' INT
trap 'exit 143' TERM

evaluate() { # tasks, settings, flags
    local tasks=$1 settings=$2 code
    shift 2
    count=$((count + 1))
    "${launch[@]}" evaluate_diff.py --tasks "$tasks" --model mdlm --batch_size 16 \
        --model_args "${model:+model_name=$model,}ckpt_path='$ckpt',$settings" "$@"
    code=$?
    [ "$code" -eq 0 ] || failed+=("$tasks (exit code $code)")
}

evaluate lambada_standard "nll_type='chain_rule',greddy=True,cfg=1.1" "$@"
evaluate openbookqa,boolq "nll_type='chain_rule',cfg=1.6" "$@"
evaluate piqa "nll_type='chain_rule',cfg=0.6" "$@"
evaluate arc_easy "nll_type='mc',cfg=0.6" "$@"
evaluate social_iqa "nll_type='mc',cfg=0.6" "$@"
evaluate race "nll_type='mc',cfg=0.7" "$@"
evaluate hellaswag "nll_type='mc',cfg=0.7" "$@"

if [ "${#failed[@]}" -gt 0 ]; then
    echo "$0: ${#failed[@]} of $count evaluations failed:" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
fi
