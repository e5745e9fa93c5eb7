"""Exact retrieval: nearest gallery items, rank-k, mAP and mINP, and the published evaluation protocols."""

from gaitfast.retrieval.feature_files import open_features
from gaitfast.retrieval.metrics import rank_report
from gaitfast.retrieval.search import search

__all__ = ["open_features", "rank_report", "search"]
