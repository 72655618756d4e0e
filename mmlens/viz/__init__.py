"""Figures."""

from mmlens.viz.ablation_curves import plot_ablation_curves as plot_ablation_curves
from mmlens.viz.ablation_curves import plot_ablation_panels as plot_ablation_panels
from mmlens.viz.examples import plot_examples as plot_examples
from mmlens.viz.head_map import plot_head_map as plot_head_map
from mmlens.viz.intervals import plot_curves as plot_curves
from mmlens.viz.intervals import plot_intervals as plot_intervals
from mmlens.viz.intervals import plot_trade_off as plot_trade_off
from mmlens.viz.matrix import plot_matrix as plot_matrix
from mmlens.viz.overlay import plot_attention_overlay as plot_attention_overlay
from mmlens.viz.overlay import plot_overlay_grid as plot_overlay_grid
from mmlens.viz.scatter import plot_scatter as plot_scatter
