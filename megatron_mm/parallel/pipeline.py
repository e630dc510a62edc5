"""Messages between pipeline stages, whose sizes are known from the plan.

A micro-batch is as long as its tokens, so the number of rows of hidden states differs between micro-batches. megatron-core can make each
sender announce the size first (`variable_seq_lengths`), which costs one more message, and a wait for it, before every message. Here every
stage knows the number of rows of each micro-batch, so it only has to determine to which micro-batch a message belongs. Messages in one
direction between two stages keep their order:

    plain 1F1B    0 1 2 3 ...
    interleaved   megatron-core's table of (micro-batch, chunk); with 2 stages, 2 chunks and 4 micro-batches
                  (0 0) (1 0) (0 1) (1 1) (2 0) (3 0) (2 1) (3 1)
                  from the last stage to the first, without the last chunk: 0 1 2 3

Backward passes visit micro-batches in the same order with the chunks reversed, so gradients follow the same table with the first and the
last stage exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig


class PlannedMessages(P2PCommunicator):
    """megatron-core's communicator for the passes of one step. It looks up sizes that megatron-core would exchange."""

    def __init__(self, config: TransformerConfig, *, rows: Sequence[int]) -> None:
        """
        Args:
            rows: number of rows of each micro-batch's message, over all processes of a tensor-parallel group.
        """
        config = copy.copy(config)
        config.variable_seq_lengths = True  # makes P2PCommunicator call `_communicate_shapes`
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._shapes = [[count // parts, 1, config.hidden_size] for count in rows]
        is_first, is_last = self.pp_group.rank() == 0, self.pp_group.rank() == self.pp_group.size() - 1
        self._received, self._sent = self._order(around=is_first), self._order(around=is_last)
        self._received_gradients, self._sent_gradients = self._order(around=is_last), self._order(around=is_first)

    def _order(self, *, around: bool) -> Iterator[list[int]]:
        """Shapes of the messages in one direction between this stage and one neighbour.

        Args:
            around: whether they pass between the last stage and the first.
        """
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is None:
            return iter(self._shapes)
        table = get_schedule_table(len(self._shapes), chunks, self.config.microbatch_group_size_per_vp_stage)
        return iter([self._shapes[micro_batch] for micro_batch, chunk in table if not around or chunk < chunks - 1])

    def _communicate_shapes(
        self, tensor_send_next: torch.Tensor | None, tensor_send_prev: torch.Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Shapes of the messages from the previous and from the next stage. Called once before each exchange of messages."""
        for tensor, planned in ((tensor_send_next, self._sent), (tensor_send_prev, self._sent_gradients)):
            if tensor is not None:
                shape = next(planned)
                assert list(tensor.shape) == shape, f"a message of shape {list(tensor.shape)}, but the plan has {shape}"
        return next(self._received) if recv_prev else [], next(self._received_gradients) if recv_next else []
