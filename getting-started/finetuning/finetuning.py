"""llama-recipes' entry point, flag for flag: torchrun ... getting-started/finetuning/finetuning.py --enable_fsdp ..."""

import sys

from packtrain.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
