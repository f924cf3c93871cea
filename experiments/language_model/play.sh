#!/usr/bin/env bash
# Plays the study, two points at a time with one thread each. A second call plays only what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
out=outputs/studies/language_model
play=(python run.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 experiment=language_model evaluation.bootstrap=200)

# How long should SFT be? Epochs by the validation NLL of seed 0; the best number stands in conf/experiment/language_model.yaml.
"${play[@]}" seed=0 schedule.iterations=0 schedule.sft_epochs=1,2,4 hydra.sweep.dir=$out/start 'hydra.sweep.subdir=${seed}-${schedule.sft_epochs}'

# Three learning rates an arm, on seed 0.
rates=1e-6,3e-6,1e-5
sft_start() { echo "model.path=$out/start/$1-2/sft/policy"; }
"${play[@]}" seed=0 iter=0 optimizer.lr=$rates loss=logistic,space,tspin hydra.sweep.dir=$out/rates
"${play[@]}" seed=0 iter=0 optimizer.lr=$rates loss.sft_weight=0.5 hydra.sweep.dir=$out/rates-anchor
"${play[@]}" seed=0 schedule.iterations=0 "$(sft_start 0)" schedule.sft_lr=3e-6,1e-5,3e-5 hydra.sweep.dir=$out/rates-sft
