#!/usr/bin/env bash
# The whole paper, as a loop of the commands that docs/training.md explains: `make paper` says what it takes. Whatever is
# done is skipped by the commands themselves; the plan below only prints.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${BIN:=.venv/bin}"
: "${SSL:=data/AbdomenCT-1K}" "${SEG:=data/BTCV}" "${OUT:=runs}" "${SEEDS:=0}" "${INIT:=imagenet}" "${ARGS:=}" "${SEG_ARGS:=}"
: "${RUN:=$BIN/python}"

rows=("" "--zca" "--local" "--local --zca"                            # Table 2
      "--no-geometric" "--zca --no-geometric"                         # the missing controls
      "--local --geometric" "--local --zca --geometric")              # beyond the paper: aligned
author=("--recipe author" "--recipe author --zca")                    # and the first author's settings: one or two groups
window="-1024 3071"                                                   # of HU, theirs
names=(moco moco-zca moco-local moco-local-zca moco-nogeo moco-zca-nogeo moco-local-aligned moco-local-zca-aligned
       author-moco author-zca)
protocols=(linear-frozen linear-finetune deeplabv3plus)
for folder in "$SSL" "$SEG"; do
    [ -d "$folder" ] || { echo "make paper: $folder: no such folder; give SSL=... and SEG=... (docs/data.md)" >&2; exit 1; }
done
# runs on the phantom have names of their own, and a start that is made by itself
prefix=$("$BIN/python" -c 'import sys; from pathlib import Path; from ct import command, intake
sys.argv[0] = "make paper"
command.command(lambda _: print("phantom-" * intake.is_phantom(Path(sys.argv[1]))))()' "$SSL")
[ -z "$prefix" ] || INIT=phantom-start

suffix() { [ "$1" = 0 ] || echo "-seed$1"; }
untrained() { if [ "$INIT" = imagenet ]; then echo imagenet; else echo random; fi; }
run() { echo "\$ $*"; "$@"; }

plan() {
    local seed name split draw protocol last done=0 all=0
    echo "Plan, in $OUT: pre-training on $SSL, segmentation of $SEG, seeds $SEEDS, from $INIT"
    for seed in $SEEDS; do
        for name in "${names[@]}"; do
            name=$prefix$name$(suffix "$seed")
            if [ -e "$OUT/$name/backbone.pth" ]; then last=done
            elif [ -s "$OUT/$name/log.jsonl" ]; then last="begun: $(tail -n 1 "$OUT/$name/log.jsonl" | grep -o '"step": [0-9]*')"
            else last="to do"; fi
            echo "  pre-train $name: $last"
        done
        for split in 12.5 25 100; do
            for name in $(untrained) "${names[@]}"; do
                case "$split $name" in
                    100*|*imagenet|*random|*" moco"|*" moco-local-zca") ;;
                    *) continue ;;  # Table 1 has three rows
                esac
                case $name in imagenet|random) ;; *) name=$prefix$name ;; esac
                name=$name$(suffix "$seed")
                for draw in 0 1 2; do
                    [ "$split $draw" = "100 1" ] && break
                    for protocol in "${protocols[@]}"; do
                        all=$((all + 1))
                        [ -e "$OUT/seg/$name-$protocol-$split-$draw/result.json" ] && done=$((done + 1))
                    done
                done
            done
        done
    done
    echo "  segmentation: $done of $all runs done"
}

plan
[ -z "${PLAN:-}" ] || exit 0
for seed in $SEEDS; do
    start=$INIT
    if [ "$INIT" = start ]; then
        start=start$(suffix "$seed")
        run $RUN train_ssl.py --data "$SSL" --out "$OUT" --seed "$seed" --init random --no-geometric --name "$start" $ARGS
    fi
    for row in "${rows[@]}"; do
        [ "$start" = phantom-start ] || set -- --init "$start"
        run $RUN train_ssl.py --data "$SSL" --out "$OUT" --seed "$seed" "$@" $row $ARGS
    done
    for row in "${author[@]}"; do  # their one or two groups are too few for the processes of RUN
        run "$BIN/python" train_ssl.py --data "$SSL" --out "$OUT" --seed "$seed" "$@" $row $ARGS
    done
    for split in 12.5 25; do
        for backbone in "$(untrained)" "moco$(suffix "$seed")" "moco-local-zca$(suffix "$seed")"; do
            run "$BIN/python" train_seg.py --data "$SEG" --out "$OUT" --seed "$seed" --split $split --backbone "$backbone" $SEG_ARGS
        done
    done
    run "$BIN/python" train_seg.py --data "$SEG" --out "$OUT" --seed "$seed" --split 100 --backbone all $SEG_ARGS
    for backbone in author-moco author-zca; do
        run "$BIN/python" train_seg.py --data "$SEG" --out "$OUT" --seed "$seed" --split 100 --window $window \
            --backbone "$backbone$(suffix "$seed")" $SEG_ARGS
    done
done
run "$BIN/python" svd_spectrum.py --data "$SEG" --out "$OUT"
run "$BIN/python" train_seg.py --report --out "$OUT"
