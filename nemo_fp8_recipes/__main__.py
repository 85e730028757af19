"""`python -m nemo_fp8_recipes …` is `nemo-fp8 …`: the form that torchrun's `-m` takes."""

import sys

from nemo_fp8_recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())
