#!/usr/bin/env bash
# Makes the studies of docs/results at full size (about two hours on two cores); the committed nano tables were made
# with fewer samples by the commands they state. A killed run goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
phased-dmd reproduce fig2 --seeds 3
phased-dmd reproduce toy-2d --seeds 3 --samples 4000 &
phased-dmd reproduce nano-t2i --seeds 3 --samples 1000
wait $!
phased-dmd reproduce nano-t2v --seeds 1 --samples 400
