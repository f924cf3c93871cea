#!/usr/bin/env bash
# Play the study, two points at a time with one thread each: about an hour on two cores. A second call plays only what
# is missing. `bash experiments/language_model/play.sh 1 2` plays these seeds at the learning rates chosen on seed 0.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
out=outputs/studies/language_model
play() { python run.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 experiment=language_model evaluation.bootstrap=200 "$@"; }
continue_sft() { # seed, learning rates
    play seed="$1" schedule.iterations=0 schedule.sft_epochs=2 model.path=$out/start/"$1"-3/sft/policy schedule.sft_lr="$2" hydra.sweep.dir=$out/sft-"$1"
}

if [ $# -eq 0 ]; then
    # Choose the epochs of SFT. The best number is set in conf/experiment/language_model.yaml.
    play seed=0 schedule.iterations=0 schedule.sft_epochs=1,2,3 hydra.sweep.dir=$out/start 'hydra.sweep.subdir=${seed}-${schedule.sft_epochs}'
    # Try two learning rates per arm.
    play seed=0 iter=0 optimizer.lr=2e-6,8e-6 loss=logistic,space,tspin hydra.sweep.dir=$out/rates
    play seed=0 iter=0 optimizer.lr=2e-6,8e-6 loss.sft_weight=0.5 hydra.sweep.dir=$out/rates-anchor
    continue_sft 0 5e-6,2e-5
fi

# Play the game of every arm at its learning rate; further seeds get their own start.
for seed in ${*:-0}; do
    play seed="$seed" schedule.iterations=0 hydra.sweep.dir=$out/start "hydra.sweep.subdir=$seed-3"
    play seed="$seed" loss=logistic optimizer.lr=2e-6 loss.sft_weight=0,0.5 hydra.sweep.dir=$out/spin-"$seed"
    play seed="$seed" loss=space optimizer.lr=8e-6 hydra.sweep.dir=$out/space-"$seed"
    play seed="$seed" loss=tspin optimizer.lr=2e-6 hydra.sweep.dir=$out/tspin-"$seed"
    [ "$seed" = 0 ] || continue_sft "$seed" 2e-5
done
