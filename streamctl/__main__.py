"""`python -m streamctl` is the console command (torchrun and accelerate launch use it)."""

from streamctl.cli import main

main()
