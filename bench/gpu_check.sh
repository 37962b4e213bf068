#!/usr/bin/env bash
# Everything that can only be told on a GPU, in one command and under ten minutes: build, tests,
# benches, sanitizers.
#
#   bench/gpu_check.sh [--smoke] [STAGE...]
#
# Stages, in this order: build tests rows attention model sm90a_tests sm90a_attention memcheck
# racecheck synccheck initcheck sm90a_memcheck suite. Without one, all. Each has a time limit; one
# that fails is reported, and the next goes on; one that there is no time for counts as failed.
# `tests` are the cases with a CUDA or Triton kernel, `suite` is the rest of the test-suite. The
# kernels for compute capability 9.0 have stages of their own, after the portable ones.
#
#   --smoke          tiny shapes on the CPU, CUDA kernels emulated: the way through every stage
#   OUT              where results.json, table.txt and log.txt go [bench/results/<gpu>]
#   SECONDS_IN_ALL   no stage runs beyond these [560]
#   PYTHON           the interpreter that has torch [python3]
#   PDIFF_CUDA_ARCHITECTURES   what to build for [the GPU that is there]
#
# Needs torch, cmake, ninja and pybind11, and no network. Exit status: the number of failed stages.
# shellcheck disable=SC2329  # stages are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 100

readonly work="$PWD/build/gpu-check"
readonly site="$work/site" rows="$work/rows.jsonl" stages="$work/stages.tsv"
readonly all_stages=(
  build tests rows attention model sm90a_tests sm90a_attention
  memcheck racecheck synccheck initcheck sm90a_memcheck suite
)
readonly python="${PYTHON:-python3}"
readonly gpu_cases="(cuda or triton) and not compile and not architecture"
readonly skipped=77
unset PDIFF_CUDA_KERNELS # every stage asks for the kernels it means
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive
smoke="${GPU_CHECK_SMOKE:-}"

# Seconds a stage may take. Up to sm90a_attention they add up to the default of SECONDS_IN_ALL: only
# the sanitizers and the suite have to do with what is left.
limit_of() {
  case "$1" in
    build) echo 130 ;;
    tests) echo 90 ;;
    attention) echo 100 ;;
    rows | sm90a_tests) echo 70 ;;
    model) echo 60 ;;
    sm90a_attention) echo 40 ;;
    memcheck | sm90a_memcheck) echo 50 ;;
    racecheck) echo 60 ;;
    synccheck | initcheck) echo 35 ;;
    suite) echo 120 ;;
  esac
}

# within SECONDS FUNCTION ARGUMENTS...: in a shell of its own, which ends after so long.
within() {
  timeout --kill-after=1 "$1" "$BASH" bench/gpu_check.sh --call "${@:2}"
}

has_module() { "$python" -c "import $1" 2>/dev/null; }

# -- stages: each runs in a process of its own, with $limit seconds -------------------------------

# Where pip or setuptools are too old for pyproject.toml: the package's files, and the core by CMake.
build_without_pip() {
  local build="$work/cmake"
  echo "pip could not install; building with CMake alone"
  rm -rf "$site" && mkdir -p "$site" && cp -r pdiff_runtime "$site/" || return 1
  # shellcheck disable=SC2086  # several arguments
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPDIFF_BUILD_PYTHON=ON \
    -DPDIFF_BUILD_LIBRARY=OFF -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    -DWITH_CUDA="${PDIFF_WITH_CUDA:-OFF}" \
    ${PDIFF_CUDA_ARCHITECTURES:+-DPDIFF_CUDA_ARCHITECTURES="$PDIFF_CUDA_ARCHITECTURES"} \
    ${PDIFF_CMAKE_ARGS:-} &&
    cmake --build "$build" --target _C &&
    cmake --install "$build" --prefix "$site/pdiff_runtime" --component python
}

stage_build() {
  rm -rf "$site"
  if [[ -n $smoke ]]; then
    export PDIFF_CMAKE_ARGS="-DPDIFF_EMULATE_CUDA=ON -DPDIFF_TELL_RACES=OFF -DPDIFF_WERROR=ON"
  else
    local capability
    capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)"
    export PDIFF_WITH_CUDA=ON
    export PDIFF_CUDA_ARCHITECTURES="${PDIFF_CUDA_ARCHITECTURES:-$capability-real}"
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-index \
    --no-deps --target "$site" . || build_without_pip || return 1
  export PYTHONPATH="$site"
  if has_module click && has_module rich; then
    "$python" -P -c 'from pdiff_runtime.serve.cli import main; main()' check-env
  else
    "$python" -P -c 'from pdiff_runtime.ops.environment import environment
for row in environment().rows(): print(*row, sep="  ")'
  fi
}

needs() { has_module "$1" || { echo "no $1"; exit "$skipped"; }; }

# pytest SECONDS ARGUMENTS...: stops after so long, and says what has failed by then; a line for each
# test tells where it hung. What tests start imports what they do: in the tree there is no core.
pytest() {
  local options=(-v -p no:cacheprovider) seconds_a_test=$(($1 < 67 ? $1 - 7 : 60))
  # A call into C that hangs cannot be interrupted: the process ends with a dump of its stacks.
  if has_module pytest_timeout; then
    options+=("--timeout=$seconds_a_test" --timeout-method=thread)
  else
    options+=(-o "faulthandler_timeout=$seconds_a_test") # dumps, and lets it hang
  fi
  PYTHONSAFEPATH=1 OMP_NUM_THREADS=2 timeout --foreground --signal=INT --kill-after=4 "$(($1 - 5))" \
    "$python" -m pytest "${options[@]}" "${@:2}"
}

# all_tests EXPRESSION: by six processes, among which pytest-xdist deals out the tests if it is there.
all_tests() {
  if has_module xdist; then
    pytest "$limit" -n 6 --dist worksteal python_tests -k "$1"
  else
    printf '%s\n' python_tests/test_*.py |
      awk '{ files[NR % 6] = files[NR % 6] " " $0 } END { for (i in files) print files[i] }' |
      xargs -P 6 -L 1 "$BASH" bench/gpu_check.sh --call tests_of "$limit" "$1"
  fi
}

# tests_of SECONDS EXPRESSION FILES...: an error where one fails, not where there are none.
tests_of() { pytest "$1" -k "$2" "${@:3}" || (($? == 5)); }

stage_tests() {
  needs pytest
  if [[ -n $smoke ]]; then
    pytest "$limit" python_tests/test_attention_plan.py python_tests/test_cuda_code.py -k "not sm90a"
  else
    all_tests "$gpu_cases and not sm90a"
  fi
}

# One process a file, one after another: what hangs takes no other file's results along.
stage_sm90a_tests() {
  local files i num_failed=0 seconds
  needs pytest
  files=(python_tests/test_hybrid_attention_backward_cuda.py)
  [[ -n $smoke ]] || files=(python_tests/test_hybrid_attention_cuda.py "${files[@]}" python_tests/test_cuda_code.py)
  for ((i = 0; i < ${#files[@]}; ++i)); do
    seconds=$(((limit - SECONDS - 3) / (${#files[@]} - i))) # a share of what is left
    echo "== ${files[i]}, at most $seconds s"
    pytest "$seconds" "${files[i]}" -k sm90a || num_failed=$((num_failed + 1))
  done
  return "$num_failed"
}

stage_suite() {
  needs pytest
  if [[ -n $smoke ]]; then
    pytest "$limit" python_tests/test_schedule.py
  else
    all_tests "not ($gpu_cases) and not sm90a"
  fi
}

bench() {
  "$python" bench/gpu "$@" --out "$rows" --seconds "$((limit - 15))" ${smoke:+--smoke}
}

stage_rows() { bench machine plan unmask cross_entropy rope; }
stage_attention() { bench attention; }
stage_model() { bench model; }
stage_sm90a_attention() { bench attention --kernels sm90a; }

# sanitizer TOOL ARGUMENTS_OF_SMALLEST...
sanitizer() {
  local command=("$python" bench/gpu/smallest.py "${@:2}")
  if command -v compute-sanitizer >/dev/null && [[ -z $smoke ]]; then
    command=(compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "${command[@]}")
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}"
  elif [[ -n $smoke && $1 == memcheck ]]; then
    "${command[@]}"
  else
    echo "no compute-sanitizer"
    return "$skipped"
  fi
}

stage_memcheck() { sanitizer memcheck; }
stage_racecheck() { sanitizer racecheck --dtypes bfloat16; }
stage_synccheck() { sanitizer synccheck --dtypes bfloat16; }
stage_initcheck() { sanitizer initcheck --dtypes bfloat16; }

stage_sm90a_memcheck() {
  local tool status outcome="$skipped"
  for tool in memcheck synccheck; do
    echo "== $tool"
    status=0
    within "$((limit / 2 - 3))" sanitizer "$tool" --kernels sm90a --dtypes bfloat16 || status=$?
    if ((status != skipped && (status != 0 || outcome == skipped))); then outcome="$status"; fi
  done
  return "$outcome"
}

if [[ ${1:-} == --run ]]; then # this script calls itself, so that a limit ends the whole stage
  limit="$3"
  [[ $2 == build ]] || export PYTHONPATH="$site"
  "stage_$2"
  exit
elif [[ ${1:-} == --call ]]; then # part of a stage
  "${@:2}"
  exit
fi

# -- one after another ----------------------------------------------------------------------------

wanted=()
for argument in "$@"; do
  case "$argument" in
    --smoke) smoke=1 ;;
    -h | --help) sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' bench/gpu_check.sh; exit 0 ;;
    *)
      if [[ " ${all_stages[*]} " != *" $argument "* ]]; then
        echo "no such stage: $argument; there are ${all_stages[*]}" >&2
        exit 100
      fi
      wanted+=("$argument")
      ;;
  esac
done
((${#wanted[@]})) || wanted=("${all_stages[@]}")
export GPU_CHECK_SMOKE="$smoke"

if [[ -n $smoke ]]; then
  out="${OUT:-$work/results}"
else
  gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
  [[ -n $gpu ]] || { echo "no NVIDIA GPU here; --smoke runs on the CPU" >&2; exit 100; }
  gpu="${gpu,,}"
  out="${OUT:-bench/results/${gpu// /-}}"
fi
readonly out budget="${SECONDS_IN_ALL:-560}"
mkdir -p "$work" "$out"
rm -f "$rows" "$out/log.txt"
: >"$stages"

num_failed=0
for name in "${all_stages[@]}"; do
  [[ " ${wanted[*]} " == *" $name "* ]] || continue
  limit="$(limit_of "$name")" left=$((budget - SECONDS)) start="$SECONDS" status=0
  if ((left < 20)); then
    printf '%s\tfailed\t0\tno time left\n' "$name" >>"$stages"
    num_failed=$((num_failed + 1))
    echo "==> $name: no time left"
    continue
  fi
  ((limit <= left)) || limit="$left"
  echo "==> $name, at most $limit s"
  log="$work/$name.log"
  timeout --kill-after=5 "$limit" "$BASH" bench/gpu_check.sh --run "$name" "$limit" >"$log" 2>&1 || status=$?
  case "$status" in
    0) outcome=ok ;;
    "$skipped") outcome=skipped ;;
    124 | 137) outcome=timeout ;;
    *) outcome=failed ;;
  esac
  note="$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-150)"
  printf '%s\t%s\t%d\t%s\n' "$name" "$outcome" "$((SECONDS - start))" "$note" >>"$stages"
  { echo "==> $name: $outcome"; cat "$log"; } >>"$out/log.txt"
  if [[ $outcome == failed || $outcome == timeout ]]; then
    num_failed=$((num_failed + 1))
    grep -aE '^(FAILED|ERROR|E  |.*(Error|error:|crashed| FAILED))' "$log" | cut -c 1-200 | tail -n 12
  fi
done

PYTHONPATH="$site" "$python" bench/gpu/report.py "$rows" "$stages" "$out/results.json" |
  tee "$out/table.txt"
exit "$num_failed"
