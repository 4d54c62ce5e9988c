#!/usr/bin/env bash
# Everything to do when a GPU is at hand, in one call of at most nine minutes, in order of worth:
#
#     bench/gpu.sh OUTDIR [SECTION...]
#
# Sections: info build parity sanitizer tune quick layers ops models training memory accuracy startup. Each has its own
# time limit, so that a slow one does not starve those after it, and none starts that the nine minutes have no room for.
# Records, logs, summary.txt and, in cache/, the plan that `tune` makes are written to OUTDIR as they come. It needs no network: torch, pytest and a compiler
# are those that are there. PYTHON names the interpreter, TOTAL the seconds; DEVICE=cpu rehearses it without a GPU.
set -uo pipefail

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
TOTAL=${TOTAL:-540}
LEAST=${LEAST:-10} # seconds without which no section starts
ALL=(info build parity sanitizer tune quick layers ops models training memory accuracy startup)

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
if (($#)); then sections=("$@"); else sections=("${ALL[@]}"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
for section in "${sections[@]}"; do
    [[ " ${ALL[*]} " == *" $section "* ]] || { echo "gpu.sh: unknown section '$section'" >&2; usage; }
done

"$PYTHON" -c 'import torch' || { echo "gpu.sh: $PYTHON has no torch" >&2; exit 2; }
if [[ $DEVICE == cuda ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no GPU (DEVICE=cpu rehearses without one)" >&2
    exit 2
fi

# Seconds each section may take. They add up to more than there is: most end long before.
declare -A limit=(
    [info]=30 [build]=150 [parity]=150 [sanitizer]=60 [tune]=200 [quick]=120 [layers]=100 [ops]=60 [models]=120 [training]=90
    [memory]=60 [accuracy]=60 [startup]=90
)
marker=$([[ $DEVICE == cuda ]] && echo gpu || echo "not slow and not gpu")
bench=("$PYTHON" -m bench)
common=(--device "$DEVICE" --out "$out")
if [[ $DEVICE == cpu ]]; then common+=(--size 64 --batch 2); fi

info() {
    if [[ $DEVICE == cuda ]]; then nvidia-smi; fi
    "$PYTHON" -c 'import sys, torch; print(sys.version); print(torch.__config__.show())'
    "$PYTHON" -m fused_resnet info
}

# In place: the checkout is what is measured. The architecture is that of the GPU; "a" has Hopper's own instructions.
build() {
    if [[ $DEVICE == cuda && -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major >= 9 else ""))')
        export TORCH_CUDA_ARCH_LIST
    fi
    "$PYTHON" setup.py build_ext --inplace -q && "$PYTHON" -m fused_resnet info
}

parity() {
    local code=0
    "$PYTHON" -m pytest -q -m "$marker" -p no:cacheprovider tests/test_gpu_*.py || code=$?
    # Kernel by kernel: compiled on a GPU; without one in Triton's interpreter and in the emulator, as everywhere else.
    [[ $DEVICE != cuda ]] || "$PYTHON" -m pytest -q -m "not slow" -p no:cacheprovider \
        tests/test_cuda_*.py tests/test_triton{,_stem,_grouped,_depthwise}.py || code=$?
    return $code
}

# The caching allocator would hide what lies outside of a tensor. Tiny shapes: every access is checked.
sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there: skipped"; return 0; }
    [[ $DEVICE == cuda ]] || { echo "no GPU: skipped"; return 0; }
    local tool failed=0
    for tool in memcheck racecheck synccheck initcheck; do
        echo "--- $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
            "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu_sanitizer.py || failed=1
    done
    return $failed
}

# The sections after it follow the plan. The verdicts of the kernels' first runs are kept beside it.
tune() {
    [[ $DEVICE == cuda ]] || { echo "no GPU: skipped"; return 0; }
    local model batch
    for model in resnet50 resnet34; do
        for batch in 1 256; do
            "$PYTHON" -m fused_resnet tune --model "$model" --dtype bf16 --batch "$batch" --most 10 || return
        done
    done
}

# Without torch.compile, whose tuning takes a minute a network.
quick() {
    "${bench[@]}" models --quick "${common[@]}" --dtype bf16 --peers eager eager-graph cudnn-frontend
    "${bench[@]}" layers --quick "${common[@]}" --dtype bf16
    "${bench[@]}" training --quick "${common[@]}" --dtype bf16 --peers eager
}
layers() { "${bench[@]}" layers "${common[@]}" --dtype bf16 --backends triton cuda; }
ops() { "${bench[@]}" ops "${common[@]}" --dtype bf16 --backends cuda; }
models() {
    "${bench[@]}" models "${common[@]}" --dtype bf16 --models resnet50
    "${bench[@]}" models "${common[@]}" --dtype bf16 --models resnet18 resnet34 mobilenet_v2
}
training() { "${bench[@]}" training "${common[@]}" --dtype bf16 --models resnet50; }
memory() { "${bench[@]}" memory "${common[@]}" --dtype bf16; }
accuracy() { "${bench[@]}" accuracy "${common[@]}" --quick; }
startup() { "${bench[@]}" startup "${common[@]}" --quick --dtype bf16; }

# A section runs in a shell of its own under `timeout`, which ends its processes too.
export PYTHON DEVICE out marker
export FUSED_RESNET_CACHE=$out/cache
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary=$out/summary.txt
: >"$summary"
start=$SECONDS
child=
trap 'kill -TERM $child 2>/dev/null; wait; exit 130' INT TERM
for section in "${sections[@]}"; do
    left=$((TOTAL - (SECONDS - start)))
    seconds=$((limit[$section] < left ? limit[$section] : left))
    if ((seconds < LEAST)); then
        printf '%-10s not started: the %s s are used up\n' "$section" "$TOTAL" | tee -a "$summary"
        continue
    fi
    echo "=== $section (at most $seconds s)"
    before=$SECONDS
    timeout --kill-after=5 "$seconds" bash -c "$(declare -p bench common); $(declare -f "$section"); $section" \
        >"$out/$section.log" 2>&1 &
    child=$!
    wait "$child"
    code=$?
    case $code in
        0) word=ok ;;
        124 | 137) word="stopped at its limit of $seconds s" ;;
        *) word="FAILED (exit $code)" ;;
    esac
    last=$(grep -v '^\s*$' "$out/$section.log" | tail -1 | cut -c1-110)
    printf '%-10s %-30s %4d s  %s\n' "$section" "$word" $((SECONDS - before)) "$last" | tee -a "$summary"
done

echo
echo "=== summary"
cat "$summary"
if compgen -G "$out/*.jsonl" >/dev/null; then
    "$PYTHON" -m bench report "$out" --text
    "$PYTHON" -m bench report "$out" --out "$out/report" >"$out/report.log" 2>&1 &&
        echo "page: $out/report/index.html"
fi
! grep -q FAILED "$summary"
