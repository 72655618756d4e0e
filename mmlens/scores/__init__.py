"""One number per head and example: where heads look, what they copy, what they write."""

from mmlens.head_scores import half_mass_share as half_mass_share
from mmlens.model.cross_attention import CrossAttentionError as CrossAttentionError
from mmlens.scores.attention import gaze_score as gaze_score
from mmlens.scores.attention import null_calibrated_ram as null_calibrated_ram
from mmlens.scores.attention import query_focused_score as query_focused_score
from mmlens.scores.attention import ram_per_token as ram_per_token
from mmlens.scores.decoding import copy_score as copy_score
from mmlens.scores.decoding import visual_head_score as visual_head_score
from mmlens.scores.lift import fake_region as fake_region
from mmlens.scores.lift import ram_lift as ram_lift
from mmlens.scores.logits import logit_contribution as logit_contribution
from mmlens.scores.registry import SCORES as SCORES
from mmlens.scores.retrieval import EvidenceAttention as EvidenceAttention
from mmlens.scores.retrieval import attention_mass as attention_mass
from mmlens.scores.retrieval import evidence_attention as evidence_attention
from mmlens.scores.retrieval import key_token_coverage as key_token_coverage
from mmlens.scores.retrieval import key_token_ratio as key_token_ratio
from mmlens.scores.retrieval import ram as ram
from mmlens.scores.retrieval import vision_mass as vision_mass
from mmlens.scores.score import HeadScore as HeadScore
from mmlens.scores.significance import RamSignificance as RamSignificance
from mmlens.scores.significance import ram_significance as ram_significance
from mmlens.scores.spatial import localization_score as localization_score
from mmlens.scores.spatial import spatial_entropy as spatial_entropy
