#!/usr/bin/env bash
# Fine-tune a model in a Hugging Face folder (Llama or Qwen3) on your own text, and export the result as such a folder.
#
#   fine_tune.sh MODEL_FOLDER TEXT.txt WORK_FOLDER [SETTINGS]
#
# The text is prepared with the tokenizer of the model. WORK_FOLDER/config.toml has the sizes of the model and a schedule;
# settings override it, for example --total-steps 500 --lr-max 1e-5. The same command resumes a run that was stopped.
set -euo pipefail

model=$(realpath "$1") text=$(realpath "$2") work=$3
shift 3
[ -f "$work/config.toml" ] || tinytrain new "$work" --from "$model"
cd "$work"
[ -f data/mine/meta.json ] || tinytrain prepare "$text" --tokenizer "$model" --out data/mine
# for a chat model, `new` proposes settings for conversations; this is text
plain=(--train-data data/mine/train.npy --val-data data/mine/val.npy --packing none --document-mask false --loss-mask false)
tinytrain train config.toml "${plain[@]}" "$@"
tinytrain evaluate runs/fine_tuned --data data/mine/val.npy
[ -d fine_tuned ] || tinytrain export runs/fine_tuned fine_tuned
