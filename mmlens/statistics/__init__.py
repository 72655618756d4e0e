"""Intervals, tests and power for per-example numbers; scipy does the work.

Examples are the sampling unit throughout. Examples that share a document or an image are not independent:
average them first, or intervals are too narrow and p-values too small.

Which is used when:

- How large is a mean, or a change on the same examples: `mean_interval`, `paired_difference_interval`. They are
  what `Effect` shows.
- What share of a drop does an intervention bring back: `ratio_interval`, as `Effect.recovered` shows it.
- Is there a change at all: `paired_permutation_test`. It gives a p-value, and takes many heads only together with
- `benjamini_hochberg`: which of many heads (layers, positions) changed, with a bound on the share of false ones.
- Before the run: `minimal_detectable_effect` for numbers such as logit differences, and
  `minimal_detectable_change` for outcomes that are 0 or 1, say what n examples can show.
- Do two scores rank heads alike, or a score and an effect: `rank_correlation`, `rank_correlation_interval` and
  `permutation_p`; `split_half_reliability` and `without_noise` say how much of it noise hides.
"""

from mmlens.statistics.intervals import Interval as Interval
from mmlens.statistics.intervals import basic_interval as basic_interval
from mmlens.statistics.intervals import bootstrap_interval as bootstrap_interval
from mmlens.statistics.intervals import difference_interval_of as difference_interval_of
from mmlens.statistics.intervals import interval_of as interval_of
from mmlens.statistics.intervals import is_binary as is_binary
from mmlens.statistics.intervals import mean_interval as mean_interval
from mmlens.statistics.intervals import paired_difference_interval as paired_difference_interval
from mmlens.statistics.intervals import percentile_interval as percentile_interval
from mmlens.statistics.intervals import proportion_interval as proportion_interval
from mmlens.statistics.intervals import ratio_interval as ratio_interval
from mmlens.statistics.power import minimal_detectable_change as minimal_detectable_change
from mmlens.statistics.power import minimal_detectable_effect as minimal_detectable_effect
from mmlens.statistics.ranks import permutation_p as permutation_p
from mmlens.statistics.ranks import rank_correlation as rank_correlation
from mmlens.statistics.ranks import rank_correlation_interval as rank_correlation_interval
from mmlens.statistics.ranks import split_half_reliability as split_half_reliability
from mmlens.statistics.ranks import split_halves as split_halves
from mmlens.statistics.ranks import stepped_up as stepped_up
from mmlens.statistics.ranks import without_noise as without_noise
from mmlens.statistics.tests import benjamini_hochberg as benjamini_hochberg
from mmlens.statistics.tests import paired_permutation_test as paired_permutation_test
