"""`python -m megatron_mm` is `megatron-mm`."""

from megatron_mm.cli.main import main

if __name__ == "__main__":
    main()
