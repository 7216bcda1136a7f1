"""Exact nearest-neighbor search without copying the bank: one protocol, with one file per backend."""

from msf_core.search.base import GeneralSearch, Queries, Rows, SearchBackend
from msf_core.search.general import search_by
from msf_core.search.operator import search_bank
from msf_core.search.registry import available_backends, check_backend, find_backend, load_backend

__all__ = [
    "GeneralSearch",
    "Queries",
    "Rows",
    "SearchBackend",
    "available_backends",
    "check_backend",
    "find_backend",
    "load_backend",
    "search_bank",
    "search_by",
]
