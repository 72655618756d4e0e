"""One number per example: of logits (outcomes), of generated answers, or of whole answers that are given."""

from mmlens.metrics.agreement import first_token_agreement as first_token_agreement
from mmlens.metrics.answers import anls as anls
from mmlens.metrics.answers import exact_match as exact_match
from mmlens.metrics.answers import generated_accuracy as generated_accuracy
from mmlens.metrics.answers import generated_invalid as generated_invalid
from mmlens.metrics.answers import generating as generating
from mmlens.metrics.answers import relaxed_accuracy as relaxed_accuracy
from mmlens.metrics.outcomes import accuracy as accuracy
from mmlens.metrics.outcomes import answer_log_probability as answer_log_probability
from mmlens.metrics.outcomes import answer_rank as answer_rank
from mmlens.metrics.outcomes import invalid as invalid
from mmlens.metrics.outcomes import kl_to_clean as kl_to_clean
from mmlens.metrics.outcomes import logit_difference as logit_difference
from mmlens.metrics.outcomes import logit_difference_of as logit_difference_of
from mmlens.metrics.outcomes import reads as reads
from mmlens.metrics.whole_answers import (
    candidate_log_probability_difference as candidate_log_probability_difference,
)
from mmlens.metrics.whole_answers import choosing as choosing
from mmlens.metrics.whole_answers import mean_token_log_probability as mean_token_log_probability
from mmlens.metrics.whole_answers import multiple_choice as multiple_choice
from mmlens.metrics.whole_answers import says_yes as says_yes
from mmlens.metrics.whole_answers import whole_answer_log_probability as whole_answer_log_probability
from mmlens.metrics.whole_answers import yes_no_bias as yes_no_bias
