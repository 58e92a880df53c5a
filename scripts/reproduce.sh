#!/usr/bin/env bash
# Makes docs/results again, claim by claim (many hours on two cores). A killed run goes on where it was.
# Claims share runs with each other, in runs/reproduce; `phased-dmd reproduce all` does the same in one go.
set -euo pipefail
cd "$(dirname "$0")/.."
for claim in fig2 memory table2 table3 fig5 collapse fig8 tdm fig9 biased eq13 clamp networks sgts-fake weighting fake-lora; do
	phased-dmd reproduce "$claim" "$@"
done
phased-dmd reproduce methods "$@"
for study in toy-2d nano-t2i nano-moe nano-t2v nano-i2v; do
	phased-dmd reproduce "$study" "$@"
done
