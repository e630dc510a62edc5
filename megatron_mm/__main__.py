"""`python -m megatron_mm` is `megatron-mm`."""

from megatron_mm.cli import main

if __name__ == "__main__":
    main()
