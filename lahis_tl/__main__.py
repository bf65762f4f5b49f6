"""``python -m lahis_tl``; under ``accelerate launch --multi_gpu`` or ``torchrun``, by several processes."""

from lahis_tl.cli import main

main()
