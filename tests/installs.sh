#!/usr/bin/env bash
# Build the wheel and the source archive, install them into clean environments, and use them there:
#   tests/installs.sh python3.11 python3.12 python3.13
# Then without triton, beside Hugging Face's `kernels`, and with the oldest versions that pyproject.toml allows. torch is
# the one in constraints.txt throughout. Minutes for each, and 2 GB of disk.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
torch=$(grep '^torch==' "$root/constraints.txt")
oldest=$(sed -n '/^dependencies/,/^\]/s/^ *"\([A-Za-z]*\)>=\([0-9.]*\).*/\1==\2.*/p' "$root/pyproject.toml" | grep -v '^t\(orch\|riton\)=')

# use ENVIRONMENT: draw with it, look into a file, train two steps.
use() {
    mkdir -p "$work/run-$1/data" && cd "$work/run-$1"
    "$work/$1/bin/sdkit" txt2img "a red sphere" --seed 1 --steps 3 --out data/a.png
    echo "a red sphere" > data/a.txt
    "$work/$1/bin/python" -m finetune.train_lora --help > /dev/null
    "$work/$1/bin/python" -m finetune.train_lora --data data --output out --max-train-steps 2 --rank 2 > /dev/null
    "$work/$1/bin/sdkit" inspect out/lora.safetensors | head -1
}

# install NAME PYTHON WHAT...: a clean environment with it.
install() {
    "$2" -m venv "$work/$1"
    "$work/$1/bin/python" -m pip install --quiet "$torch"
    "$work/$1/bin/python" -m pip install --quiet -c "$root/constraints.txt" "${@:3}"
}

"$1" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build
git -C "$root" archive --prefix=source/ HEAD | tar -x -C "$work"
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/source" > /dev/null
tar -tzf "$work"/dist/*.tar.gz | grep -q tests/hostile/ || { echo "the source archive has no tests"; exit 1; }

for python in "$@"; do
    install "wheel-${python##*/}" "$python" "$work"/dist/*.whl
    use "wheel-${python##*/}"
    echo "ok: wheel, $("$python" --version)"
done

first=wheel-${1##*/}
install source "$1" "$work"/dist/*.tar.gz
use source && echo "ok: source archive"

"$work/source/bin/python" -m pip uninstall --quiet --yes triton
use source && echo "ok: without triton"

"$work/$first/bin/python" -m pip install --quiet kernels
"$work/$first/bin/python" -c "import kernels, sdkernels"
use "$first" && echo "ok: beside kernels"

# shellcheck disable=SC2086
"$work/$first/bin/python" -m pip install --quiet "$torch" $oldest
use "$first" && echo "ok: with the oldest versions: "$oldest
