#!/usr/bin/env bash
# The numeric tests with the instructions of other processors and with other numbers of threads: torch's own kernels, MKL's and
# oneDNN's each have a switch. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
failed=()
while read -r machine; do
  echo "== $machine"
  env $machine "$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), "thread(s)")'
  env $machine "$python" -m pytest -n 2 --dist loadfile -m "numeric and not slow" "$@" < /dev/null || failed+=("$machine")
done << 'END'
OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2
OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default
OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE
OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=SSE41
OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE
OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
END
((${#failed[@]} == 0)) || { printf 'failed on: %s\n' "${failed[@]}"; exit 1; }
