#!/usr/bin/env bash
# Answers on one GPU what could not be answered without: one command, about an hour, resumable.
#
#   deploy/gpu/try.sh OUT [--fa3 FOLDER] [--wheels FOLDER]
#
# Every part ends within 9 minutes and leaves OUT/PART.log (and OUT/PART.json where it measures);
# a part whose OUT/PART.done is there is not run again. --fa3 is a folder with FlashAttention 3 for
# machines without vLLM, --wheels one with the wheels that Python lacks there (no index is asked).
# A part that the machine cannot run says so and is skipped. Ends with 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

usage() { echo "usage: deploy/gpu/try.sh OUT [--fa3 FOLDER] [--wheels FOLDER]" >&2; exit 2; }
[ $# -ge 1 ] || usage
mkdir -p "$1" && OUT=$(cd "$1" && pwd) && shift || usage
FA3=() WHEELS=""
while [ $# -gt 0 ]; do
  case $1 in
    --fa3) [ -d "${2:-}" ] || { echo "--fa3 is '${2:-}', must be a folder" >&2; exit 2; }
      FA3=(--fa3 "$2"); shift 2 ;;
    --wheels) [ -d "${2:-}" ] || { echo "--wheels is '${2:-}', must be a folder" >&2; exit 2; }
      WHEELS=$2; shift 2 ;;
    *) echo "unknown argument '$1'" >&2; usage ;;
  esac
done

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$WHEELS" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$OUT/site" \
    "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$OUT/site:$PYTHONPATH
fi
has() { "$PYTHON" -c "$1" >/dev/null 2>&1; }
GPU=""; has 'import torch; assert torch.cuda.is_available()' || GPU="no CUDA device"
VLLM=$GPU; [ -n "$GPU" ] || has 'import vllm' || VLLM="no vLLM installed"
SANITIZER=$GPU; [ -n "$GPU" ] || command -v compute-sanitizer >/dev/null || SANITIZER="no compute-sanitizer"
[ ${#FA3[@]} -gt 0 ] || has 'import vllm.vllm_flash_attn' || echo "FlashAttention 3: none (--fa3)"
FAILED=0

part() { # NAME, why it is skipped or nothing, command
  local name=$1 skip=$2 start=$SECONDS status; shift 2
  if [ -e "$OUT/$name.done" ]; then echo "$name: done before"; return; fi
  if [ -n "$skip" ]; then echo "$name: skipped, $skip: $*"; return; fi
  timeout -k 40 540 "$@" >"$OUT/$name.log" 2>&1; status=$?
  if [ $status = 0 ]; then
    touch "$OUT/$name.done"; echo "$name: done in $((SECONDS - start)) s"
  else
    FAILED=1; echo "$name: FAILED ($status) after $((SECONDS - start)) s, see $OUT/$name.log"
    tail -n 5 "$OUT/$name.log"
  fi
}
dam() { echo "$PYTHON" -m dam_vllm "$@"; }
UNIT=("$PYTHON" -m pytest -q -p no:cacheprovider)
KERNEL=($(dam bench kernel) "${FA3[@]}")

part machine "$GPU" "$PYTHON" -c 'from dam_vllm.machine import *; import torch; print(torch.cuda.get_device_name())'
part smoke "$GPU" "$PYTHON" deploy/gpu/smoke.py "$OUT/smoke.json" "${KERNEL[@]}" --lengths 8192 \
  --batches 1 --kv-heads 8 --densities 0.1,1.0 --rounds 5
part kernels "$GPU" "${UNIT[@]}" tests/unit/attention/cuda
part benches "$GPU" "${UNIT[@]}" tests/unit/bench
part backend "$VLLM" "${UNIT[@]}" tests/engine/test_cuda_backend.py \
  tests/engine/test_cuda_tails.py tests/engine/test_cuda_launches.py tests/engine/test_cuda_flags.py
part sanitizer "$SANITIZER" compute-sanitizer --error-exitcode 9 "${UNIT[@]}" \
  tests/unit/attention/cuda/test_paged.py -k "page and mixed"
part tune "$GPU" $(dam bench tune) --json "$OUT/tune.json"
for heads in 8 2; do
  for phase in chunk prefill decode; do
    part "$phase-$heads" "$GPU" "${KERNEL[@]}" --phase "$phase" --kv-heads "$heads" \
      --flex-up-to 0 --json "$OUT/$phase-$heads.json"
  done
done
# A synchronisation or a kernel that is compiled while requests are served ends the server.
for kernel in flash triton; do
  part "serve-$kernel" "$VLLM" env VLLM_GPU_SYNC_CHECK=error "$PYTHON" deploy/gpu/serve.py "$kernel"
done
for load in 32768:1,4 131072:1; do
  tokens=${load%:*}
  part "e2e-$tokens" "$VLLM" $(dam bench e2e) --model llama-3.1-8b --lengths "$tokens" \
    --concurrency "${load#*:}" --density 0.1 --rounds 3 --json "$OUT/e2e-$tokens.json"
done
[ $FAILED = 0 ] && echo "results: $OUT"
exit $FAILED
