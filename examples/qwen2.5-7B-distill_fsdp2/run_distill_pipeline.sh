#!/bin/bash
# Overrides:  bash run_distill_pipeline.sh max_steps=100 student.training_args.learning_rate=1e-5
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# the project's environment, if it exists and no other is active
python="$here/../../.venv/bin/python"
if [[ -n "${VIRTUAL_ENV:-}" || ! -x "$python" ]]; then python=python; fi

"$python" "$here/../start_distill_pipeline.py" \
  --config_path "$here" \
  --config_name distill_fsdp2 \
  "$@"
