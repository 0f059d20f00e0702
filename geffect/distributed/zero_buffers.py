"""Where an engine of DeepSpeed keeps gradients and parameters, at each of its ZeRO stages."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Piece:
    """Of which tensor, flattened, and from where to where, a stand-in is; and who has the rest."""

    shape: torch.Size
    begin: int
    end: int
    group: "ProcessGroup"


class Buffers(Protocol):
    """Where an engine keeps the gradients and parameters of this process, at one of its stages."""

    def piece(self, parameter: Tensor) -> Piece:
        """What this process holds of a parameter."""

    def master(self, parameter: Tensor) -> Tensor:
        """What the optimizer steps of it: this process's piece, where it lies."""

    def grad(self, parameter: Tensor) -> Tensor:
        """The piece of its gradient, where it lies, after a backward pass."""

    def arrive(self) -> None:
        """Wait for gradients that are on their way to where they lie."""

    def group_of(self, parameter: Tensor) -> int:
        """Which of the optimizer's groups of parameters has it."""

    @property
    def passed(self) -> bool:
        """Whether the engine has made a backward pass since `begin`, or its step."""

    def begin(self) -> None:
        """Have the next backward pass be the first of a step."""

    def clear(self) -> None:
        """Forget gradients: the next pass adds to none."""

    def settle(self, parameters: Sequence[Tensor]) -> None:
        """Take note that gradients were written by another hand."""

    def publish(self) -> None:
        """Bring to the model what is in the optimizer's copies of the parameters."""


def buffers_of(zero: Any, stage: int) -> Buffers:
    """Those of the optimizer of an engine at a stage."""
    return _OfStage3(zero) if stage == 3 else _OfStages1And2(zero)


class _OfStages1And2:
    """Parameters are whole, and a process steps a piece of them all, laid end to end."""

    def __init__(self, zero: Any) -> None:
        self._zero = ref(zero)
        groups = enumerate(zero.bit16_groups)
        self._groups = {id(p): i for i, group in groups for p in group}

    @property
    def zero(self) -> Any:
        return self._zero()

    def piece(self, parameter: Any) -> Piece:
        begin = end = 0
        if parameter._hp_mapping is not None:
            address = parameter._hp_mapping.lp_fragment_address
            begin, end = address.start, address.start + address.numel
        return Piece(parameter.shape, begin, end, self.zero.dp_process_group)

    def master(self, parameter: Any) -> Tensor:
        if parameter._hp_mapping is None:
            flat: Tensor = self.zero.single_partition_of_fp32_groups[self.group_of(parameter)]
            return flat.detach()[:0]
        fragment: Tensor = parameter._hp_mapping.hp_fragment
        return fragment.detach()

    def grad(self, parameter: Any) -> Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:
            return self.master(parameter)
        kept: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return kept.detach().view(-1)

    def arrive(self) -> None:
        self.zero._wait_for_offload_copies()

    def group_of(self, parameter: Tensor) -> int:
        return self._groups[id(parameter)]

    @property
    def passed(self) -> bool:
        return bool(self.zero.micro_step_id >= 0)

    def begin(self) -> None:
        self.zero.micro_step_id = -1

    def clear(self) -> None:
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        self.begin()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
            for flat in zero.single_partition_of_fp32_groups:
                flat.grad.zero_()
        else:
            for i in range(len(zero.bit16_groups)):
                zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None

    def settle(self, parameters: Sequence[Any]) -> None:
        zero = self.zero
        if not zero.cpu_offload:
            return
        # The engine has taken the norms when the gradients came.
        zero.local_overflow = False
        wide = sys.modules[type(zero).__module__].get_norm_dtype()
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                grad = self.grad(parameter)
                zero.norm_for_param_grads[zero.get_param_id(parameter)] = grad.to(wide).norm(2)
                zero.update_offload_overflow_tracker(grad)

    def publish(self) -> None:
        self.zero.update_lp_params()
        for i in range(len(self.zero.bit16_groups)):
            self.zero._update_model_bit16_weights(i)


class _OfStage3:
    """Every parameter is cut into as many pieces as there are processes, the last one padded."""

    def __init__(self, zero: Any) -> None:
        self._zero = ref(zero)
        groups = enumerate(zero.fp16_groups)
        self._sub_groups = {id(p): i for i, group in groups for p in group}

    @property
    def zero(self) -> Any:
        return self._zero()

    def piece(self, parameter: Any) -> Piece:
        zero, whole = self.zero, int(parameter.ds_numel)
        each = int(parameter.partition_numel())
        begin = min(each * zero._get_param_partition_rank(parameter), whole)
        return Piece(parameter.ds_shape, begin, min(begin + each, whole), zero.dp_process_group)

    def master(self, parameter: Any) -> Tensor:
        sub_group, start, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat: Tensor = self.zero.fp32_partitioned_groups_flat[sub_group]
        return flat.detach().narrow(0, start, self._held(parameter))

    def grad(self, parameter: Any) -> Tensor:
        kept, _ = self.zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        own: Tensor = kept.detach().view(-1)
        return own.narrow(0, 0, self._held(parameter))

    def arrive(self) -> None:
        pass  # a pass of this stage ends when they are there

    def group_of(self, parameter: Tensor) -> int:
        return int(self.zero.sub_group_to_group_id[self._sub_groups[id(parameter)]])

    @property
    def passed(self) -> bool:
        return bool(self.zero.micro_step_id > 0 or self.zero._epilogue_ran_this_backward)

    def begin(self) -> None:
        self.zero.micro_step_id = 0
        self.zero._epilogue_ran_this_backward = False

    def clear(self) -> None:
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        zero._offload_boundary_param_ids = set()
        zero.grad_partitions_flat_buffer.zero_()
        if zero.offload_optimizer:
            zero.norm_for_param_grads = {}
            for flat in zero.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    def settle(self, parameters: Sequence[Any]) -> None:
        zero = self.zero
        if not zero.offload_optimizer:
            return
        for parameter in parameters:
            grad = self.grad(parameter)
            if grad.numel():
                norm = zero._constant_buffered_norm2(grad)
                zero.norm_for_param_grads[zero.get_param_id(parameter)] = norm

    def publish(self) -> None:
        zero = self.zero
        zero._partition_all_parameters()  # those that stay whole would not be gathered anew
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _held(self, parameter: Tensor) -> int:
        piece = self.piece(parameter)
        return piece.end - piece.begin
