#!/usr/bin/env bash
# The main job on the bundled model: convert, plan, generate on two stages with less memory than the model needs.
set -euo pipefail
cd "$(dirname "$0")/.."
store=.demo/stories-9m.nf4
input=.demo/prompts.jsonl
output=.demo/stories.jsonl
mkdir -p .demo
rm -f "$output"*
head -n 24 examples/prompts.jsonl >"$input"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
say headrace convert examples/stories-9m "$store" --format nf4
memory=(--stages 2 --device cpu --device-memory 6MiB --host-memory 0 --context 128 --dtype bfloat16)
say headrace plan "$store" "${memory[@]}"
say headrace generate "$store" "${memory[@]}" --input "$input" --output "$output" \
    --max-tokens 100 --temperature 0.6 --top-p 0.95
say python examples/show.py "$output" --rows 3
