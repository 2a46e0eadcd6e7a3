#!/usr/bin/env bash
# Everything that only a GPU can show: `bash benchmarks/gpu_suite.sh [OUT] [PART ...]`.
#
# Builds from this checkout against the torch found here, without downloading anything, then:
#   1  every kernel once, then all tests on `cuda`
#   2  compute-sanitizer: memcheck and racecheck of every kernel on small shapes
#   3  the kernels beside their baselines and peers: OUT/gpu_kernels.json
#   4  generate() with a 7B-shaped model, dynamic cache: OUT/gpu_generate.json
#   5  the same with a static cache and CUDA graphs: OUT/gpu_generate_static.json
#   6  training: attention forward and backward, one optimiser step: OUT/gpu_training*.json
# Each part is cut off before 9 minutes and keeps what it had found; a failure of one does not stop the
# next, the exit status tells. Results belong into benchmarks/results/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(realpath -m "${1:-benchmarks/results}")
shift || true
parts=("$@")
(( ${#parts[@]} )) || parts=(1 2 3 4 5 6)
mkdir -p "$out"
failed=0

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
part() { [[ " ${parts[*]} " == *" $1 "* ]]; }
try() { "$@" 2>&1 || { echo "FAILED ($?): $*"; return 1; }; }

say "build"
# A package manager's own isolation would download what is already here.
python3 -m pip install --quiet --no-deps --no-build-isolation --no-index \
  --config-settings cmake.define.LOOKAGAIN_CUDA=ON -e . || exit 1
python3 -c "
import lookagain_ext, torch
print(lookagain_ext.build_info(), torch.__version__, torch.cuda.get_device_name())" || exit 1

if part 1; then
  say "every kernel"
  try timeout 90 python3 -m benchmarks.gpu_every_kernel | tail -n 15 || failed=1
  say "tests on cuda"
  workers=()
  python3 -c "import xdist" 2>/dev/null && workers=(-n 10)  # most of a test is not on the GPU
  try timeout 330 python3 -m pytest -q --maxfail=20 "${workers[@]}" -k "cuda and not emulated" \
    --ignore python_tests/test_many_queries.py python_tests -p no:cacheprovider |
    tee "$out/gpu_tests.log" | tail -n 40 || failed=1
  # In processes of their own: a kernel that fails takes all that its process does after it along.
  try timeout 100 python3 -m pytest -q --maxfail=20 "${workers[@]}" -k "cuda and not emulated" \
    python_tests/test_many_queries.py -p no:cacheprovider |
    tee "$out/gpu_tests_many_queries.log" | tail -n 20 || failed=1
fi

if part 2; then
  for tool in memcheck racecheck; do
    say "compute-sanitizer $tool"
    # Without torch's caching allocator, so that one byte too far is another's memory; only our kernels
    # are instrumented.
    try env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 250 compute-sanitizer --tool "$tool" \
      --kernel-name kns=routed_attention --kernel-name kns=append_ --kernel-name kns=select_ --kernel-name kns=visual_mass \
      --kernel-name kns=join_kernel --kernel-name kns=grad_ --kernel-name kns=mark_keys --kernel-name kns=list_keys \
      --error-exitcode 9 python3 -m benchmarks.gpu_every_kernel |
      tee "$out/gpu_$tool.log" | tail -n 15 || failed=1
  done
fi

if part 3; then
  say "kernels"
  try timeout 520 python3 -m benchmarks.gpu_kernels --out "$out/gpu_kernels.json" || failed=1
fi

if part 4; then
  say "generate, dynamic cache"
  try timeout 520 python3 -m benchmarks.gpu_generate --out "$out/gpu_generate.json" || failed=1
fi

if part 5; then
  say "generate, static cache"
  try timeout 520 python3 -m benchmarks.gpu_generate --static --batch 1 --batch 8 \
    --out "$out/gpu_generate_static.json" || failed=1
fi

if part 6; then
  say "training"
  try timeout 270 python3 -m benchmarks.gpu_training --no-own-kernels \
    --out "$out/gpu_training.json" || failed=1
  try timeout 80 python3 -m benchmarks.gpu_training --suite attention --suite mass \
    --compile-seconds 0 --out "$out/gpu_training_own_kernels.json" || failed=1
  try timeout 180 python3 -m benchmarks.gpu_training_step --out "$out/gpu_training_step.json" ||
    failed=1
fi

say "done, results in $out"
exit "$failed"
