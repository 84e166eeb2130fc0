#!/usr/bin/env bash
# Everything a GPU can tell, on a bare machine with torch, Triton and nvcc, where a command may run
# ten minutes and few files come back:
#
#     bench/gpu.sh FOLDER [SECONDS [PART]]
#
# What the steps rest on is tested first, while the CUDA sources are compiled; then whole steps and the
# benchmark from its most telling rows on, all tests, and the CUDA kernels. Every part has a limit and
# a log of its own. FOLDER gets summary.txt and all.tar.gz, with all logs and pages, anew after every
# part, so what was measured stays if time runs out.
#
# A later call goes on from PART, the first that had no time by summary.txt, also on another machine
# (it compiles again). SECONDS (590) is when to stop: what its caller has left, if that is less. All parts
# together take less than 30 minutes, three calls.
#
# PYTHON names the interpreter. ORTHONORM_COMMIT names the source where there is no git repository:
# pages and logs say it.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh FOLDER [SECONDS [PART]]" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.." || exit 2
ROOT="$PWD"
LIMIT="${2:-590}"
FROM="${3:-}"
PY="${PYTHON:-python3}"
WORK="$(mktemp -d)" || exit 2
BUILD=""
trap '[ -z "$BUILD" ] || kill "$BUILD" 2>/dev/null; rm -rf "$WORK"' EXIT
export PYTHONUNBUFFERED=1
code=0

say() { echo "$1" | tee -a "$WORK/summary.txt" && cp "$WORK/summary.txt" "$OUT/summary.txt"; }

# part NAME LIMIT COMMAND...: run it for LIMIT seconds or what is left, with a log.
# An interrupt comes first: pytest then says what has failed so far, the benchmark writes its pages.
part() {
  local name="$1" most="$2" left=$((LIMIT - SECONDS)); shift 2
  [ -n "$FROM" ] && [ "$FROM" != "$name" ] && return 0
  FROM=""
  if [ "$left" -lt 10 ]; then
    say "$name: no time left"
    return 0
  fi
  local begin="$SECONDS" result=0
  timeout -s INT -k 8 "$((most < left - 8 ? most : left - 8))" "$@" >"$WORK/$name.log" 2>&1 || result=$?
  say "$name: exit $result after $((SECONDS - begin)) s"
  [ "$result" -eq 0 ] || { code=1; tail -n 15 "$WORK/$name.log"; }
  tar -C "$WORK" --exclude=./links -czf "$OUT/all.tmp" . && mv "$OUT/all.tmp" "$OUT/all.tar.gz"
}

bench() { # name, seconds, arguments of the benchmark
  local name="$1" most="$2"; shift 2
  part "bench-$name" "$most" "$PY" -m orthonorm bench "$@" --device cuda --json "$WORK/$name.json" \
    --html "$WORK/$name.html"
}

# The package by links, so that nothing is installed: as it stands, without what is compiled if "pure".
use() {
  local package="$WORK/links/$1/orthonorm" file
  mkdir -p "$package"
  for file in "$ROOT"/python/orthonorm/*; do
    [ "$1:${file##*.}" = pure:so ] || ln -sfn "$file" "$package/"
  done
  for file in kernels bench examples; do ln -sfn "$ROOT/$file" "$package/"; done
  export PYTHONPATH="$WORK/links/$1${OWN_PATH:+:$OWN_PATH}"
}

if [ -n "$FROM" ] && [ -f "$OUT/all.tar.gz" ]; then
  tar -C "$WORK" -xzf "$OUT/all.tar.gz" && sed -i "/: no time left$/d" "$WORK/summary.txt"
fi
OWN_PATH="${PYTHONPATH:-}"
TESTS=("$PY" -m pytest -m gpu tests/test_gpu.py -o faulthandler_timeout=40)
MANY=() # processes: what takes long in a first run is compiling, one kernel after the other
"$PY" -c "import xdist" 2>/dev/null && MANY=(-n 16)
part machine 20 bash -c "git log -1 --format=%H || echo \"\${ORTHONORM_COMMIT:-}\"; \
  $PY -m torch.utils.collect_env; nvidia-smi"
MAX_JOBS=8 timeout "$LIMIT" bash -c '"$0" setup.py -q build_ext --inplace; echo $? >"$1"' "$PY" \
  "$WORK/build.code" >"$WORK/compiler.log" 2>&1 &
BUILD=$!
# Triton needs no compiler run, and is measured first.
use pure
part backends 40 "$PY" -m orthonorm
part tests-first 90 "${TESTS[@]}" "${MANY[@]}" \
  -k "test_error and (gram or apply or newton or muon or conda)"
# What no CPU can answer.
part tests-hardware 100 "${TESTS[@]}" "${MANY[@]}" --maxfail=30 \
  -k "graph or waits or same_bits or company or bands or optimizer"
# Nothing is timed beside a compiler. Later parts need the build too, on whatever machine they are.
[ "$FROM" != build ] || FROM=""
FROM="" part build 200 bash -c 'tail -n +1 -s 0.2 -f --pid="$0" "$1"; exit "$(cat "$2")"' "$BUILD" \
  "$WORK/compiler.log" "$WORK/build.code"
bench graphs 60 muon_step_ normuon_step_ --seconds 2 --dtype bfloat16 float32 --shape gpt2-small \
  --against torch package
bench polynomials 110 newton_schulz --seconds 2 --dtype bfloat16 --against torch package \
  --shape 4096x11008 gpt2-small 2048x2048 1024x4096 12x768x768 64x128x128
bench steps 40 muon normuon --seconds 2 --dtype float32 --shape gpt2-small --against torch
part tests 150 "${TESTS[@]}" "${MANY[@]}" --maxfail=30 \
  -k "not (graph or waits or same_bits or company or bands or optimizer)"
bench moments 60 power_iteration_ rotated_adam_ row_moment_ column_moment_ row_normalize \
  muon_prologue_ decayed_update_ --seconds 1 --dtype bfloat16 --shape gpt2-small \
  --against floor torch
bench words 50 gram symmetric_update apply --seconds 1 --dtype bfloat16 --shape 2048x2048 \
  12x768x768 --against floor torch
bench chains 30 gram_polynomial --seconds 1 --dtype float16 --against reference \
  --shape 12x64x64 12x128x128 12x256x256 132x256x256  # one launch each: kernels/gram_polynomial.py
part tune 75 "$PY" -m orthonorm.bench.tune --out "$WORK/tuned" --seconds 45
# Its peers decompose 48 matrices.
bench conda 50 conda_step_ conda --seconds 2 --dtype float32 --shape gpt2-small --against torch
# The CUDA kernels replace Triton's where they exist: tested again, timed beside their Triton twins,
# and run under the four tools of compute-sanitizer, on small inputs.
use compiled
part backends-compiled 40 "$PY" -m orthonorm
part tests-compiled 120 "${TESTS[@]}" "${MANY[@]}" --maxfail=30
bench twins 100 power_iteration_ decayed_update_ muon_prologue_ rotated_adam_ adamw_step_ magnitude \
  row_moment_ column_moment_ factored_moment_ elementwise_moment_ inner --seconds 1 \
  --dtype bfloat16 --shape gpt2-small 4096x11008 --against floor backend
bench small-twins 40 small_newton_schulz --seconds 1 --dtype bfloat16 float16 \
  --shape 500x32x32 128x128x128 --against floor backend
bench chain-twins 20 gram_polynomial --seconds 1 --dtype bfloat16 float16 \
  --shape 500x32x32 500x64x64 100x128x128 --against floor backend
bench cluster-twins 40 gram_polynomial direct_polynomial --seconds 1 --dtype float16 \
  --shape 256x256 32x256x256 512x512 16x512x512 --against backend
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor an allocation of its own, with its own ends
sanitize() { # name, seconds, tests
  for tool in memcheck racecheck initcheck synccheck; do
    part "$tool-$1" "$2" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes all "${TESTS[@]}" --maxfail=3 -k "$3"
  done
}
sanitize bands 50 "test_bands"  # accesses of 16 bytes
sanitize layouts 30 "test_layout or test_nonfinite_and_empty"
[ -z "$FROM" ] || { echo "gpu.sh: no part is called $FROM" >&2; exit 2; }
exit "$code"
