"""What interventions do to metrics: one, many, and grids of patches."""

from mmlens.effects.grids import grid as grid
from mmlens.effects.grids import patch_heads as patch_heads
from mmlens.effects.grids import patch_heads_qkv as patch_heads_qkv
from mmlens.effects.grids import patch_layers as patch_layers
from mmlens.effects.grids import patch_layers_positions as patch_layers_positions
from mmlens.effects.grids import patch_layers_regions as patch_layers_regions
from mmlens.effects.measure import Effect as Effect
from mmlens.effects.measure import effect as effect
from mmlens.effects.sweeps import reuse_table as reuse_table
from mmlens.effects.sweeps import sweep as sweep
