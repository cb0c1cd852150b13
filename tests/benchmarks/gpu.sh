#!/bin/sh
# What only a GPU shows, in ten minutes on one: tables on standard output. It installs nothing and draws its images.
#
#   tests/benchmarks/gpu.sh [PATH/TO/timm/train.py]
#   tests/benchmarks/gpu.sh --smoke [PATH/TO/timm/train.py]    the same lines with tiny sizes, on a CPU
#
# bench_train.py explains the columns; "end" is selection and calibration.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD" NO_ALBUMENTATIONS_UPDATE=1
device=cuda images=4096 size=224 workers=8 batches="32 128 256" loaders="1 2 4 8 16" steps="--steps 20 --precision bf16"
if [ "${1:-}" = --smoke ]; then
    shift
    device=cpu images=8 size=32 workers=1 batches=4 loaders=1 steps="--steps 3"
fi
timm="${1:+--timm $1}"
python="${PYTHON:-python}"

train() { # BATCH, settings of bench_train.py
    batch=$1
    shift
    "$python" tests/benchmarks/bench_train.py --device $device --images $images --size $size --batch "$batch" --rounds 1 "$@"
}

echo "## Steps alone"
for batch in $batches; do
    "$python" tests/benchmarks/bench_blocks.py --device $device --size $size --batch "$batch" $steps
done
echo "## Start"
"$python" tests/benchmarks/bench_start.py --rounds 1 --accelerator $device
echo "## Tests"
"$python" -m pytest -q tests/test_gpu.py # with a resume that is equal bit for bit
echo "## Whole runs"
for batch in $batches; do
    train "$batch" --workers $workers $timm --vary ""
done
echo "## Averaged weights, selection and calibration"
train "${batches##* }" --workers $workers --vary "--model.ema=0.99 --model.strategy.blend=true --model.calibrate=true"
if "$python" -m rexnet_lit fit --help_all | grep -q -e --model.compile; then
    echo "## Compiled"
    train "${batches##* }" --workers $workers --vary "--model.compile=true"
fi
echo "## Loader processes, images decoded in each epoch"
for workers in $loaders; do
    train "${batches##* }" --workers "$workers" --vary "--data.cache=none"
done
