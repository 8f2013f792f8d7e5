#!/bin/bash -eu
# What a farm of the OSS-Fuzz kind runs: every target into $OUT, with its corpus.
cd "$SRC/mana-vmm/device-model/fuzz"
cargo fuzz build -O --debug-assertions --features server
for source in fuzz_targets/*.rs; do
    target=$(basename "$source" .rs)
    cp "target/x86_64-unknown-linux-gnu/release/$target" "$OUT/"
    (cd "corpus/$target" && zip -q "$OUT/${target}_seed_corpus.zip" ./*)
done
printf '[libfuzzer]\nmax_len = 64\n' | tee "$OUT/config.options" >"$OUT/bar0.options"
