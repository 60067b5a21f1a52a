"""The picture of a shunt: small model, decision, large model."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.graph import Graph, Node


def shunt_graph(
    shunt: Runnable[Any, Any],
    stages: tuple[Runnable[Any, Any], ...],
    large: Runnable[Any, Any],
    config: RunnableConfig | None,
) -> Graph:
    """Input, each small model in turn, the large model's own graph, output; who answers leads to the output."""
    graph = Graph()
    before = graph.add_node(shunt.get_input_schema(config))
    end = graph.add_node(shunt.get_output_schema(config))
    label: str | None = None
    for stage in stages:
        node = graph.add_node(stage)
        graph.add_edge(before, node, data=label, conditional=label is not None)
        graph.add_edge(node, end, data="confident", conditional=True)
        before, label = node, "deferred"
    first, last = _extend(graph, large, config)
    graph.add_edge(before, first, data="deferred", conditional=True)
    graph.add_edge(last, end)
    return graph


def _extend(graph: Graph, large: Runnable[Any, Any], config: RunnableConfig | None) -> tuple[Node, Node]:
    inner = large.get_graph(config)
    inner.trim_first_node()
    inner.trim_last_node()
    first, last = inner.first_node(), inner.last_node()
    if not inner.nodes or first is None or last is None:
        node = graph.add_node(large)
        return node, node
    graph.extend(inner)
    return first, last
