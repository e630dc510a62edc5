"""Tensors that Transformer Engine's modules store between the forward and the backward pass, with references to its source.

A test reads the source of the release that the tests use (2.11.0) and compares the names that are passed to `prepare_for_saving` or
`save_for_backward` at each line.
"""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "2.11.0"


@dataclass(frozen=True)
class Saved:
    """Tensors that one module saves."""

    file: str
    """Path below transformer_engine/pytorch."""
    line: int
    """Line at which the call that saves the tensors begins."""
    names: tuple[str, ...]
    """Arguments of this call, as in the source."""
    bytes: str
    """Description of the saved tensors and their bytes, in bf16 and in FP8."""


TE_SAVES: dict[str, Saved] = {
    "LayerNormLinear": Saved(
        "module/layernorm_linear.py",
        466,
        ("inputmat", "weightmat", "weight", "bias", "ln_weight", "ln_out", "mu", "rsigma"),
        "the input and the normalised input, 2 bytes per number (in FP8, 1 for the normalised input, which the weight gradient uses), and "
        "one or two fp32 numbers per row. Under sequence parallelism the normalised input is kept split, and gathered again in the "
        "backward pass. `weightmat` is the weight itself; in FP8, a copy",
    ),
    "Linear": Saved(
        "module/linear.py",
        433,
        ("saved_inputmat", "weightmat", "weight", "bias"),
        "the input, 2 bytes per number (1 in FP8)",
    ),
    "GroupedLinear": Saved(
        "module/grouped_linear.py",
        250,
        ("inputmats", "weights_fp8", "weights", "biases"),
        "the inputs of all experts of the process, 2 bytes per number (1 in FP8)",
    ),
    "FusedAttention": Saved(
        "attention/dot_product_attention/backends.py",
        1323,
        ("fp8_tensors", "qkvo_tensors", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "aux_ctx_tensors"),
        "queries, keys, values and the output, 2 bytes per number; an fp32 log-sum-exp per row and head; the random state",
    ),
    "RMSNorm": Saved("ops/basic/rmsnorm.py", 202, ("x", "rstdevs"), "the input and an fp32 number per row"),
    "LayerNorm": Saved("ops/basic/layer_norm.py", 221, ("x", "means", "rstdevs"), "the input and two fp32 numbers per row"),
    "rotary positions": Saved(
        "attention/rope.py",
        152,
        ("freqs", "cu_seqlens", "start_positions"),
        "only the frequencies: the gradient is the inverse rotation. The results are new tensors, so queries, keys and values are no views "
        "of one buffer, and attention copies the values (get_qkv_layout in attention/dot_product_attention/utils.py): nothing keeps the "
        "projection's output",
    ),
    "parallel cross-entropy": Saved(
        "cross_entropy.py",
        62,
        ("inp.detach()",),
        "the logits, which the gradient overwrites (`platform.engine` asks later releases for it)",
    ),
}
