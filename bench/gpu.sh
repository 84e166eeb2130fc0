#!/usr/bin/env bash
# Everything a GPU can tell, on a bare machine with torch, Triton and nvcc, in under ten minutes:
#
#     bench/gpu.sh FOLDER [SECONDS [PART]]
#
# What the steps rest on is tested first, then whole steps and the benchmark from its most telling rows
# on, all tests, and the CUDA sources, if any. Every part has a limit and a log of its own in FOLDER,
# so what was measured stays if time runs out, and in FOLDER/all.tar.gz, made anew after every part.
# A later call goes on from PART, a name in summary.txt. PYTHON names the interpreter.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh FOLDER [SECONDS [PART]]" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.." || exit 2
ROOT="$PWD"
LIMIT="${2:-590}"
FROM="${3:-}"
PY="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
code=0

# part NAME LIMIT COMMAND...: run it for LIMIT seconds or what is left, log to FOLDER/NAME.log.
# An interrupt comes first: pytest then says what has failed so far, the benchmark writes its pages.
part() {
  local name="$1" most="$2" left=$((LIMIT - SECONDS)); shift 2
  [ -n "$FROM" ] && [ "$FROM" != "$name" ] && return 0
  FROM=""
  if [ "$left" -lt 10 ]; then
    echo "$name: no time left" | tee -a "$OUT/summary.txt"
    return 0
  fi
  local begin="$SECONDS" result=0
  timeout -s INT -k 8 "$((most < left - 8 ? most : left - 8))" "$@" >"$OUT/$name.log" 2>&1 || result=$?
  echo "$name: exit $result after $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
  [ "$result" -eq 0 ] || { code=1; tail -n 15 "$OUT/$name.log"; }
  (cd "$OUT" && tar --exclude=./pure --exclude="./all.*" -czf all.tmp . && mv all.tmp all.tar.gz)
}

bench() { # name, seconds, arguments of the benchmark
  local name="$1" most="$2"; shift 2
  part "bench-$name" "$most" "$PY" -m orthonorm bench "$@" --device cuda --json "$OUT/$name.json" \
    --html "$OUT/$name.html"
}

pure() { # the package as it stands, without what is compiled: nothing to install
  local package="$OUT/pure/orthonorm" file
  mkdir -p "$package"
  for file in "$ROOT"/python/orthonorm/*; do
    case "$file" in *.so) ;; *) ln -sfn "$file" "$package/" ;; esac
  done
  for file in kernels bench examples; do ln -sfn "$ROOT/$file" "$package/"; done
  export PYTHONPATH="$OUT/pure${PYTHONPATH:+:$PYTHONPATH}"
}

[ -n "$FROM" ] || : >"$OUT/summary.txt"
OWN_PATH="${PYTHONPATH:-}"
TESTS=("$PY" -m pytest -m gpu tests/test_gpu.py -o faulthandler_timeout=40)
MANY=() # processes: what takes long in a first run is compiling, one kernel after the other
"$PY" -c "import xdist" 2>/dev/null && MANY=(-n 8)
part machine 30 bash -c "git log -1 --format=%H; $PY -m torch.utils.collect_env; nvidia-smi"
# Triton needs no compiler run, and is measured first.
pure
part backends 60 "$PY" -m orthonorm
part tests-first 90 "${TESTS[@]}" "${MANY[@]}" \
  -k "test_error and (gram or apply or newton or muon or conda)"
bench graphs 80 muon_step_ normuon_step_ conda_step_ --seconds 2 --dtype bfloat16 float32 --shape gpt2-small \
  --against torch package
bench polynomials 110 newton_schulz --seconds 2 --dtype bfloat16 --against torch package \
  --shape 1024x4096 2048x2048 12x768x768 64x128x128 gpt2-small 4096x11008
bench steps 60 muon normuon conda --seconds 2 --dtype float32 --shape gpt2-small --against torch
part tests 150 "${TESTS[@]}" "${MANY[@]}" --maxfail=30
bench moments 60 rotated_adam_ row_moment_ column_moment_ row_normalize muon_prologue_ \
  decayed_update_ power_iteration_ --seconds 1 --dtype bfloat16 --shape gpt2-small \
  --against floor torch
bench words 50 gram symmetric_update apply --seconds 1 --dtype bfloat16 --shape 2048x2048 \
  12x768x768 --against floor torch
bench chains 30 gram_polynomial --seconds 1 --dtype float16 --against torch \
  --shape 12x64x64 12x128x128 12x256x256 132x256x256  # one launch each: kernels/gram_polynomial.py
part tune 75 "$PY" -m orthonorm.bench.tune --out "$OUT/tuned" --seconds 45
# The CUDA sources replace Triton where they exist: built last, tested again, also under
# compute-sanitizer (its four tools on small inputs), and timed beside their Triton twins.
export PYTHONPATH="$OWN_PATH"
part build 200 "$PY" -m pip install -q --no-build-isolation --no-deps -e .
part backends-compiled 60 "$PY" -m orthonorm
part tests-compiled 120 "${TESTS[@]}" "${MANY[@]}" --maxfail=30
bench twins 100 decayed_update_ muon_prologue_ rotated_adam_ adamw_step_ magnitude row_moment_ \
  column_moment_ factored_moment_ elementwise_moment_ inner power_iteration_ --seconds 1 \
  --dtype bfloat16 --shape gpt2-small 4096x11008 \
  --against floor backend
bench small-twins 40 small_newton_schulz --seconds 1 --dtype bfloat16 float16 \
  --shape 500x32x32 128x128x128 --against floor backend
bench chain-twins 20 gram_polynomial --seconds 1 --dtype bfloat16 float16 \
  --shape 500x32x32 500x64x64 100x128x128 --against floor backend
bench cluster-twins 40 gram_polynomial direct_polynomial --seconds 1 --dtype float16 \
  --shape 256x256 32x256x256 512x512 16x512x512 --against backend
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor an allocation of its own, with its own ends
for tool in memcheck racecheck initcheck synccheck; do
  part "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    "${TESTS[@]}" -k "test_layout or test_bands or test_nonfinite_and_empty" --maxfail=3
done
[ -z "$FROM" ] || { echo "gpu.sh: no part is called $FROM" >&2; exit 2; }
exit "$code"
