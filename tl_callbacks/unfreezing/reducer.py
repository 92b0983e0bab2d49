"""Rebuilds DistributedDataParallel's reducer in place, so that it reduces what trains now.

DDP averages only the gradients of parameters that required one when it wrapped the model. A parameter opened later
would be updated from local gradients, apart on each rank, without a word.
"""

from typing import Any


def rebuild_reducer(wrapper: Any) -> None:
    """Give `wrapper` a new reducer over the parameters that require a gradient now. The wrapper stays the same object.

    Call it on all ranks at once, between optimizer steps, when no gradient is pending. Communication hooks are kept.

    Args:
        wrapper: the `DistributedDataParallel` around the model; untyped because what is called is private to torch
            (the same three calls that its `__setstate__` makes).
    """
    hooks = list(wrapper._comm_hooks)
    wrapper._comm_hooks.clear()
    parameters, expect_sparse_gradient = wrapper._build_params_for_reducer()
    wrapper._ddp_init_helper(
        parameters,
        expect_sparse_gradient,
        wrapper._build_debug_param_to_name_mapping(parameters),
        wrapper.static_graph,
    )
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
