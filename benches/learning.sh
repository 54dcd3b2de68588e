#!/usr/bin/env bash
# How fast models learn here, and beside PyTorch: trains both on the same text and prints what they reached and when.
#
#   benches/learning.sh characters TEXT VENV/bin/python    nanoGPT's small run of characters with experts: seconds to a validation loss of 1.88
#   benches/learning.sh minutes TEXT                       the loss by character after about ten minutes on two cores with AVX-512
#   benches/learning.sh documents JSONL VENV/bin/python    bits per byte of the last 200 documents after twenty minutes of training on the others
#   benches/learning.sh tokens TEXT PRESET                 tokens that the default recipe needs for the loss that AdamW alone ends with
#   benches/learning.sh reference JSONL VENV/bin/python    200 steps of --recipe reference beside PyTorch, the same batches and weights, noise off
#
# SEEDS="1 2 3" says which seeds, THREADS how many threads; DTYPE the type of ours in characters and minutes, f32 where bf16 is slow; COMPILE=1
# has PyTorch compile as well in characters; STEPS how long minutes trains, and AdamW in tokens, there at rate ADAMW_LR; ONLY=ours or ONLY=torch
# one side of documents. Runs go to runs/learning. Needs jq.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
task=$1 text=$(realpath "$2")
read -ra seeds <<<"${SEEDS:-1 2 3}"
threads=${THREADS:-$(nproc)}
runs=$root/runs/learning
command -v jq >/dev/null || { echo "learning.sh: needs jq: on Debian, apt-get install jq" >&2; exit 1; }
(cd "$root" && cargo build --release --bin param-train >&2)
mkdir -p "$runs"

# Trains anew in runs/learning/NAME; prints the folder.
train() {
    local out=$runs/$1
    shift
    rm -rf "$out"
    "$root/target/release/param-train" --out "$out" --threads "$threads" --sample-every 0 --save-every 0 --no-report --log-every 1000 "$@" \
        2>"$out.log" >&2 || { cat "$out.log" >&2; exit 1; }
    echo "$out"
}

# The first evaluation of a run that reached loss $2: step, loss, tokens and seconds of training.
reached() {
    jq -rs --argjson loss "$2" '
        (map(select(.ce)) | map({(.step | tostring): {n_target, seconds}}) | add) as $at
        | map(select(.eval_loss and .eval_loss <= $loss)) | first // error("never reached")
        | "step \(.step)  loss \(.eval_loss * 1e4 | round / 1e4)  \($at[.step | tostring].n_target) tokens  \($at[.step | tostring].seconds * 10 | round / 10) s"
    ' "$1/metrics.jsonl"
}

case $task in
characters)
    python=${3:?characters needs VENV/bin/python}
    for seed in "${seeds[@]}"; do
        out=$(train "characters-$seed" --data "$text" --chars --holdout 0.1 --config "$root/benches/peers/torch/char.toml" --seed "$seed" \
            --dtype "${DTYPE:-bf16}" --batch-size 24 --steps 300 --eval-every 10)
        echo "PARAM          seed $seed  $(reached "$out" 1.88)"
        for compile in "" ${COMPILE:+--compile}; do
            row=$("$python" "$root/benches/peers/torch/learn.py" --recipe nanogpt --preset "$root/benches/peers/torch/char.toml" --data "$text" \
                --seed "$seed" -t "$threads" --dispatch gather --until 1.88 --eval-every 50 --steps 3000 --schedule-steps 2000 $compile | tail -1)
            echo "PyTorch ${compile:-       } seed $seed  $(jq -r '"step \(.step)  loss \(.eval_loss * 1e4 | round / 1e4)  \(.n_token) tokens  \(.seconds) s"' <<<"$row")"
        done
    done
    ;;
minutes)
    for seed in "${seeds[@]}"; do
        start=$SECONDS
        # As many batches as the last tenth has.
        out=$(train "minutes-$seed" --data "$text" --chars --holdout 0.1 --config "$root/benches/peers/torch/char.toml" --seed "$seed" \
            --context 256 --batch-size 12 --dropout 0.1 --dtype "${DTYPE:-bf16}" --steps "${STEPS:-5600}" --eval-every 500 --eval-batches 36)
        best=$(jq -rs 'map(select(.eval_loss)) | min_by(.eval_loss) | "loss \(.eval_loss * 1e4 | round / 1e4) at step \(.step)"' "$out/metrics.jsonl")
        echo "seed $seed  $best  $((SECONDS - start)) s with evaluation"
    done
    ;;
documents)
    python=${3:?documents needs VENV/bin/python}
    config=$root/benches/peers/torch/documents.toml seconds=1200
    head -n -200 "$text" >"$runs/documents.jsonl"
    tail -n 200 "$text" >"$runs/documents-held-out.jsonl"
    data=(--data "$runs/documents.jsonl" --eval-data "$runs/documents-held-out.jsonl")
    for seed in "${seeds[@]}"; do
        if [ "${ONLY:-ours}" = ours ]; then
            # As many steps as fit, by this machine's speed right now, evaluations aside.
            speed=$("$root/target/release/param-train" --benchmark 40 --config "$config" --batch-size 16 --threads "$threads" 2>/dev/null | jq '."tok/s"')
            steps=$(jq -n "$seconds * $speed / (16 * 256) | floor")
            out=$(train "documents-$seed" "${data[@]}" --config "$config" --seed "$seed" --batch-size 16 --steps "$steps" --eval-every $((steps / 8 + 1)))
            jq -rs --arg seed "$seed" '
                (map(select(.ce)) | last) as $end | map(select(.eval_loss)) | last
                | "PARAM    seed \($seed)  \(.bits_per_byte * 1e4 | round / 1e4) bits per byte  \($end.n_target) tokens  \($end.seconds | round) s"
            ' "$out/metrics.jsonl"
        fi
        if [ "${ONLY:-torch}" = torch ]; then
            # The tokenizer that a run of ours learns from the same documents, and the reference's schedule, which never ends in this time.
            out=$(train documents-tokenizer "${data[@]}" --config "$config" --steps 1 --eval-batches 1)
            row=$("$python" "$root/benches/peers/torch/learn.py" --recipe reference --preset "$config" "${data[@]}" --tokenizer "$out/last/tokenizer.json" \
                --seed "$seed" -t "$threads" --dispatch gather --seconds "$seconds" --steps 1000000 --schedule-steps 8625000 --eval-every 500 \
                | tee "$runs/documents-torch-$seed.jsonl" | tail -1)
            jq -r --arg seed "$seed" '"PyTorch  seed \($seed)  \(.bits_per_byte * 1e4 | round / 1e4) bits per byte  \(.n_token) positions  \(.seconds | round) s"' <<<"$row"
        fi
    done
    ;;
tokens)
    preset=${3:?tokens needs a preset}
    total=${STEPS:-1200}
    for seed in "${seeds[@]}"; do
        common=(--data "$text" --preset "$preset" --seed "$seed")
        adamw=$(train "tokens-adamw-$seed" "${common[@]}" --steps "$total" --optimizer adamw ${ADAMW_LR:+--lr "$ADAMW_LR"})
        final=$(jq -s 'map(select(.eval_loss)) | last.eval_loss' "$adamw/metrics.jsonl")
        needed=$(jq -s 'map(select(.ce)) | last.n_target' "$adamw/metrics.jsonl")
        echo "AdamW          seed $seed  loss $final after $needed tokens"
        # A shorter run ends lower than a longer one was at that step: the shortest whole run that gets there counts.
        for percent in 30 40 50 60 70 80 90 100; do
            steps=$((total * percent / 100))
            ours=$(train "tokens-ours-$seed" "${common[@]}" --steps "$steps" --eval-every "$steps")
            loss=$(jq -s 'map(select(.eval_loss)) | last.eval_loss' "$ours/metrics.jsonl")
            echo "default recipe seed $seed  loss $loss after $percent% of the tokens"
            [ "$(jq -n "$loss <= $final")" = false ] || break
        done
    done
    ;;
reference)
    python=${3:?reference needs VENV/bin/python}
    common=(--data "$text" --preset param-tiny --set use_noisy_top_k=false --set dropout_rate=0 --seed "${seeds[0]}" --recipe reference)
    out=$(train reference --eval-data "$text" --eval-batches 1 --steps 200 "${common[@]}")
    # The weights that the run began with, and its tokenizer.
    rm -rf "$runs/reference-start"
    "$root/target/release/param-train" --out "$runs/reference-start" --init-only --tokenizer "$out/last/tokenizer.json" "${common[@]:2}" >&2
    "$python" "$root/benches/peers/torch/learn.py" --recipe reference --init-from "$runs/reference-start" --data "$text" --eval-data "$text" \
        --tokenizer "$out/last/tokenizer.json" --no-noise --losses --steps 200 --eval-every 1000 --schedule-steps 200 -t "$threads" \
        >"$runs/reference.jsonl"
    jq -rs --slurpfile theirs "$runs/reference.jsonl" '
        [map(select(.ce)), ($theirs | map(select(.loss)))] | transpose | map({step: .[0].step, ours: .[0].loss, theirs: .[1].loss})
        | (map((.ours / .theirs - 1) | fabs) | max) as $most
        | (.[] | select(.step % 50 == 0 or .step == 1) | "step \(.step)  PARAM \(.ours)  PyTorch \(.theirs)"),
          "largest relative difference of any step: \($most)"
    ' "$out/metrics.jsonl"
    ;;
*) usage ;;
esac
