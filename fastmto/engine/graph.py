"""Walks through the autograd graph: what losses are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter

#: An output of a node of the graph.
_Edge = tuple[Node, int]


def graph_root(loss: Tensor) -> Tensor | GradientEdge:
    """Where the backward of `loss` starts: for an entry of `torch.stack(losses)`, at the scalar
    that was stacked. The stack itself would send zeros down every other task's graph."""
    unbind = loss.grad_fn
    if unbind is None or unbind.name() != "UnbindBackward0":
        return loss
    ((stack, _),) = unbind.next_functions
    if stack is None or stack.name() != "StackBackward0":
        return loss
    node, output = stack.next_functions[loss.output_nr]
    return loss if node is None else GradientEdge(node, output)


def _edge(tensor: Tensor | GradientEdge) -> _Edge:
    edge = tensor if isinstance(tensor, GradientEdge) else get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _walk(losses: Sequence[Tensor], stop: Set[_Edge]) -> Iterator[_Edge]:
    """The edges of the graph behind the losses; it is not followed through `stop`."""
    waiting = [_edge(graph_root(loss)) for loss in losses]
    seen = {node for node, _ in waiting}
    yield from waiting
    while waiting:
        node, output = waiting.pop()
        if (node, output) in stop:
            continue
        for behind, nr in node.next_functions:
            if behind is None:
                continue
            edge = (behind, nr)
            yield edge
            if edge not in stop and behind not in seen:
                seen.add(behind)
                waiting.append(edge)


def graph_nodes(losses: Sequence[Tensor], beyond: Sequence[Tensor]) -> set[Node]:
    """The nodes that the losses are computed by, up to the tensors `beyond` of the graph."""
    stop = {_edge(x) for x in beyond}
    return {edge[0] for edge in _walk(losses, stop) if edge not in stop}


def reaches(loss: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph of a loss leads to any of the tensors."""
    stop = {_edge(x) for x in inputs}
    return any(edge in stop for edge in _walk([loss], stop))


def leaves(losses: Sequence[Tensor], beyond: Sequence[Tensor]) -> list[Parameter]:
    """The `torch.nn.Parameter`s that the losses are computed from, in the graph's order, up to
    the tensors `beyond` of the graph."""
    return [leaf for leaf in graph_leaves(losses, beyond) if isinstance(leaf, Parameter)]


def graph_leaves(losses: Sequence[Tensor], beyond: Sequence[Tensor]) -> list[Tensor]:
    """The same of all leaf tensors."""
    stop = {_edge(x) for x in beyond}
    return [
        node.variable
        for node, nr in dict.fromkeys(_walk(losses, stop))
        if (node, nr) not in stop and hasattr(node, "variable")
    ]
