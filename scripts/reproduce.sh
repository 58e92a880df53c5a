#!/usr/bin/env bash
# Makes docs/results again (many hours on two cores). A killed run goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
phased-dmd reproduce fig2 --seeds 3
phased-dmd reproduce memory
phased-dmd reproduce toy-2d --seeds 5 --samples 4000 &
phased-dmd reproduce nano-t2i --seeds 3 --samples 1000
wait $!
phased-dmd reproduce nano-moe --seeds 3 --samples 1000 &
phased-dmd reproduce nano-t2v --seeds 1 --samples 160
phased-dmd reproduce nano-i2v --seeds 1 --samples 160
wait
# Claims share runs with each other and with the studies above, so one after the other.
for claim in fig8 tdm fig9 biased eq13 clamp sgts-fake weighting fake-lora; do
	phased-dmd reproduce "$claim"
done
