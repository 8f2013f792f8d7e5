#!/bin/bash -eu
# What a farm of the OSS-Fuzz kind runs: every target into $OUT, with its corpus, its dictionary and its options.
cd "$SRC/mana-vmm/device-model/fuzz"
cargo fuzz build -O --debug-assertions --features server
for source in fuzz_targets/*.rs; do
    target=$(basename "$source" .rs)
    cp "target/x86_64-unknown-linux-gnu/release/$target" "$OUT/"
    (cd "corpus/$target" && zip -q "$OUT/${target}_seed_corpus.zip" ./*)
    # As resources/fuzz has it.
    case $target in
    vfio_user | restore) length=8192 ;;
    packets) length=1024 ;;
    config | bar0) length=64 ;;
    *) length=160 ;;
    esac
    printf '[libfuzzer]\nmax_len = %d\ndict = dictionary\n' "$length" >"$OUT/$target.options"
done
cp dictionary "$OUT/"
