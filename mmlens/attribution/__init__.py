"""Gradients in place of runs: of every node, of every edge, and how far they can be trusted."""

from mmlens.attribution.check import PatchingComparison as PatchingComparison
from mmlens.attribution.check import compare_with_patching as compare_with_patching
from mmlens.attribution.edges import EdgeAttribution as EdgeAttribution
from mmlens.attribution.edges import attribute_edges as attribute_edges
from mmlens.attribution.nodes import Attribution as Attribution
from mmlens.attribution.nodes import attribute as attribute
