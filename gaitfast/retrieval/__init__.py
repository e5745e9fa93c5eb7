"""Exact retrieval: nearest gallery items, rank-k, mAP and mINP, and the published evaluation protocols."""

from gaitfast.retrieval.metrics import rank_report
from gaitfast.retrieval.search import search

__all__ = ["rank_report", "search"]
