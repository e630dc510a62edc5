"""`megatron-mm convert` under the name that Megatron users expect.

python tools/convert_checkpoint.py {to-hf,from-hf,inspect,upcycle} ...
"""

from __future__ import annotations

import sys

from megatron_mm.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
